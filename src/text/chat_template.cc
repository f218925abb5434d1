// SPDX-License-Identifier: Apache-2.0
#include "text/chat_template.h"

#include "base/error.h"
#include "text/file.h"
#include "text/json_fields.h"

namespace kilin::text {
namespace {

constexpr size_t kMaxTemplateBytes = size_t{4} << 20;
constexpr size_t kMaxConfigBytes = size_t{32} << 20;

OrderedJson special_token_variables(const Json& config) {
  OrderedJson variables = OrderedJson::object();
  for (const char* key :
       {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}) {
    const Json* value = find_field(config, "tokenizer_config.json", key);
    if (value == nullptr) continue;
    variables[key] = value->is_object() ? string_field(*value, key, "content")
                                        : string_field(config, "tokenizer_config.json", key);
  }
  return variables;
}

// chat_template is the text, or a list of named ones: the one called `name` then.
std::optional<std::string> template_of(const Json& config, std::string_view name) {
  const Json* value = find_field(config, "tokenizer_config.json", "chat_template");
  if (value == nullptr) return {};
  if (!value->is_array()) {
    if (name != "default") return {};
    return string_field(config, "tokenizer_config.json", "chat_template");
  }
  for (const Json& entry : *value) {
    if (string_field(entry, "chat_template", "name") == name) {
      return string_field(entry, "chat_template", "template");
    }
  }
  return {};
}

Json read_config(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return Json::object();
  return parse_json(read_file(path, kMaxConfigBytes));
}

std::string dumped(const OrderedJson& variables, std::string_view what) {
  try {
    return variables.dump();
  } catch (const OrderedJson::exception& error) {
    fail("{}: {}", what, error.what());  // strings that are not UTF-8
  }
}

}  // namespace

std::optional<ChatTemplate> ChatTemplate::load(const std::filesystem::path& model_dir) {
  const auto file = model_dir / "chat_template.jinja", config_path = model_dir / "tokenizer_config.json";
  try {
    const Json config = read_config(config_path);
    const bool own_file = std::filesystem::exists(file);
    const auto source = own_file ? read_file(file, kMaxTemplateBytes) : template_of(config, "default");
    if (!source) return {};
    const std::string name = own_file ? file.string() : config_path.string() + ": chat_template";
    ChatTemplate loaded(name, *source, special_token_variables(config));
    if (const auto tools = template_of(config, "tool_use"); tools && !own_file) {
      loaded.tool_template_.emplace(name + " 'tool_use'", *tools);
    }
    const Json* kind = find_field(config, "tokenizer_config.json", "tokenizer_class");
    loaded.sort_tools_ = kind != nullptr && *kind == "TikTokenTokenizer";
    return loaded;
  } catch (const Error& error) {
    fail("{}: {}", model_dir.string(), error.what());
  }
}

ChatTemplate::ChatTemplate(std::string name, std::string source, OrderedJson variables)
    : template_(std::move(name), std::move(source)), variables_(std::move(variables)) {}

std::string ChatTemplate::render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                                 const OrderedJson& extra) const {
  OrderedJson list = OrderedJson::array();
  for (const ChatMessage& message : messages) {
    list.push_back({{"role", message.role}, {"content", message.content}});
  }
  return render_json(list, nullptr, add_generation_prompt, extra);
}

std::string ChatTemplate::render_json(const OrderedJson& messages, const OrderedJson& tools,
                                      bool add_generation_prompt, const OrderedJson& extra) const {
  check(messages.is_array(), "chat template: messages are {}, expected an array", messages.type_name());
  check(tools.is_array() || tools.is_null(), "chat template: tools are {}, expected an array",
        tools.type_name());
  check(extra.is_object(), "chat template: variables are {}, expected an object", extra.type_name());
  OrderedJson variables = variables_;
  variables["messages"] = messages;
  variables["tools"] = sort_tools_ ? OrderedJson(Json(tools)) : tools;  // Json keeps its keys sorted
  variables["documents"] = nullptr;
  variables["add_generation_prompt"] = add_generation_prompt;
  for (const auto& [key, value] : extra.items()) variables[key] = value;
  const JinjaTemplate& chosen = tool_template_ && !tools.is_null() ? *tool_template_ : template_;
  return chosen.render(dumped(variables, "chat template"));
}

}  // namespace kilin::text
