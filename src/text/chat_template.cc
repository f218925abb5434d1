// SPDX-License-Identifier: Apache-2.0
#include "text/chat_template.h"

#include "base/error.h"
#include "text/file.h"
#include "text/gguf_tokenizer.h"
#include "text/json_fields.h"

namespace kilin::text {
namespace {

constexpr size_t kMaxTemplateBytes = size_t{4} << 20;
constexpr size_t kMaxConfigBytes = size_t{32} << 20;
constexpr const char* kConfigFile = "tokenizer_config.json";

OrderedJson special_token_variables(const Json& config) {
  OrderedJson variables = OrderedJson::object();
  for (const char* key :
       {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"}) {
    const Json* value = find_field(config, kConfigFile, key);
    if (value == nullptr) continue;
    variables[key] =
        value->is_object() ? string_field(*value, key, "content") : string_field(config, kConfigFile, key);
  }
  return variables;
}

// chat_template is the text, or a list of named ones: the one called `name` then.
std::optional<std::string> template_of(const Json& config, std::string_view name) {
  const Json* value = find_field(config, kConfigFile, "chat_template");
  if (value == nullptr) return {};
  if (!value->is_array()) {
    if (name != "default") return {};
    return string_field(config, kConfigFile, "chat_template");
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

struct NamedText {
  std::string name;
  ChatTemplateText source;
};

std::optional<NamedText> find_text(const std::filesystem::path& model_dir, const Json& config) {
  const auto file = model_dir / "chat_template.jinja";
  if (std::filesystem::exists(file))
    return NamedText{file.string(), {read_file(file, kMaxTemplateBytes), {}}};
  auto text = template_of(config, "default");
  if (!text) return {};
  return NamedText{(model_dir / kConfigFile).string() + ": chat_template",
                   {std::move(*text), template_of(config, "tool_use")}};
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
  try {
    const Json config = read_config(model_dir / kConfigFile);
    const auto found = find_text(model_dir, config);
    if (!found) return {};
    ChatTemplate loaded(found->name, found->source.text, special_token_variables(config));
    if (const auto& tools = found->source.tools) {
      loaded.tool_template_.emplace(found->name + " 'tool_use'", *tools);
    }
    const Json* kind = find_field(config, kConfigFile, "tokenizer_class");
    loaded.sort_tools_ = kind != nullptr && *kind == "TikTokenTokenizer";
    return loaded;
  } catch (const Error& error) {
    fail("{}: {}", model_dir.string(), error.what());
  }
}

std::optional<ChatTemplateText> ChatTemplate::load_text(const std::filesystem::path& model_dir) {
  try {
    const auto found = find_text(model_dir, read_config(model_dir / kConfigFile));
    return found ? std::optional(found->source) : std::nullopt;
  } catch (const Error& error) {
    fail("{}: {}", model_dir.string(), error.what());
  }
}

std::optional<ChatTemplate> ChatTemplate::from_gguf(const io::GgufFile& file, const Tokenizer& tokenizer) {
  const auto found = gguf_chat_template(file);
  if (!found) return {};
  const std::pair<const char*, std::optional<int32_t>> named[] = {{"bos_token", tokenizer.bos_id()},
                                                                  {"eos_token", tokenizer.eos_id()},
                                                                  {"unk_token", tokenizer.unk_id()},
                                                                  {"pad_token", tokenizer.pad_id()}};
  OrderedJson variables = OrderedJson::object();
  for (const auto& [key, id] : named) {
    if (id) variables[key] = tokenizer.token_bytes(*id);
  }
  const std::string name = file.path() + ": " + kGgufChatTemplateKey;
  ChatTemplate loaded(name, found->text, std::move(variables));
  if (found->tools) loaded.tool_template_.emplace(name + " 'tool_use'", *found->tools);
  loaded.sort_tools_ = gguf_tokenizer_class(file) == "TikTokenTokenizer";
  return loaded;
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
