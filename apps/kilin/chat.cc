// SPDX-License-Identifier: Apache-2.0
// kilin chat: a conversation in the terminal.
#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "base/error.h"
#include "io/atomic_file.h"
#include "kilin/chat_session.h"
#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/interrupt.h"
#include "kilin/output.h"
#include "kilin/progress.h"

namespace kilin::cli {
namespace {

constexpr const char* kCommands =
    R"(/help         this list
/reset        begin a new conversation
/system TEXT  set the system message and begin a new conversation
/save FILE    write the conversation to FILE as JSON
/quit         leave (so does Ctrl-D)
Ctrl-C stops an answer.)";

constexpr const char* kFooter =
    R"(A line is a message. Lines that begin with '/' are commands: /help lists them.
Ctrl-C stops an answer, Ctrl-D or /quit ends. If standard input is not a
terminal, every line of it is a message and no prompt is shown.

Examples:
  kilin chat models/kilin-docs-10m
  kilin chat models/kilin-docs-10m --system "Answer in one line." --temperature 0
  echo "What is Unix?" | kilin chat models/kilin-docs-10m)";

struct ChatOptions {
  ChatOptions() {
    generate.max_tokens = 1024;
    generate.sampling.temperature = 0.7;
    generate.sampling.top_p = 0.95;
  }
  ModelArguments model;
  std::string system;
  GenerateOptions generate;
};

// One line of standard input; nothing at its end. A signal (Ctrl-C) that ends the wait gives an empty line.
class LineReader {
 public:
  LineReader() = default;
  ~LineReader() { std::free(buffer_); }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  std::optional<std::string> read() {
    const ssize_t length = getline(&buffer_, &capacity_, stdin);
    if (length < 0) {
      const bool ended = std::feof(stdin) != 0 || errno != EINTR;
      std::clearerr(stdin);
      return ended ? std::nullopt : std::optional<std::string>("");
    }
    std::string line(buffer_, static_cast<size_t>(length));
    while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
    return line;
  }

 private:
  char* buffer_ = nullptr;
  size_t capacity_ = 0;
};

class Chat {
 public:
  Chat(const Model& model, const ChatOptions& options)
      : terminal_(is_terminal(STDIN_FILENO) && is_terminal(STDERR_FILENO)),
        session_(model, options.system, with_callbacks(options.generate)) {
    if (terminal_) note(fmt::format("{} - /help lists the commands, Ctrl-D ends", model.info().path));
  }

  int run() {
    LineReader reader;
    while (true) {
      const auto line = read_line(reader);
      if (!line) break;
      if (line->empty()) continue;
      if (line->front() == '/') {
        if (!command(*line)) break;
      } else if (!answer(*line)) {
        return failed_ ? 1 : 0;
      }
    }
    return failed_ ? 1 : 0;
  }

 private:
  static void note(const std::string& text) {
    std::fputs((text + "\n").c_str(), stderr);
    std::fflush(stderr);
  }

  GenerateOptions with_callbacks(GenerateOptions options) {
    options.on_prefill = [this](int64_t) { return !interrupt_->interrupted(); };
    options.on_text = [](std::string_view text) { return write_out(text); };
    options.on_token = [this](int32_t) { return !interrupt_->interrupted(); };
    return options;
  }

  std::optional<std::string> read_line(LineReader& reader) const {
    if (!terminal_) return reader.read();
    std::fputs("> ", stderr);
    std::fflush(stderr);
    const InterruptScope interrupt;
    auto line = reader.read();
    if (interrupt.interrupted()) note("\n(Ctrl-D or /quit ends)");
    if (!line) note("");
    return line;
  }

  // An error ends a conversation that nobody watches; a person may try something else. False: stop.
  bool report(const std::exception& error) {
    note("kilin: error: " + one_line(error.what()));
    failed_ = !terminal_;
    return terminal_;
  }

  bool answer(const std::string& line) {
    const InterruptScope interrupt;
    interrupt_ = &interrupt;
    try {
      check_text(line, "the message");
      const GenerateResult result = session_.answer(line);
      if (!write_out(terminal_ ? "\n\n" : "\n")) return false;
      if (terminal_ && result.finish_reason == "length") note("(cut off: -n allows no more tokens)");
      if (terminal_ && interrupt.interrupted()) note("(stopped)");
      return terminal_ || !interrupt.interrupted();
    } catch (const std::exception& error) {
      return report(error);
    }
  }

  // False: leave.
  bool command(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string name = line.substr(0, space);
    const size_t argument = line.find_first_not_of(' ', std::min(space, line.size()));
    const std::string rest = argument == std::string::npos ? "" : line.substr(argument);
    if (name == "/quit" || name == "/exit") return false;
    try {
      if (name == "/help") {
        note(kCommands);
      } else if (name == "/reset") {
        session_.reset();
        note("(new conversation)");
      } else if (name == "/system") {
        check_text(rest, "the system message");
        session_.set_system(rest);
        note(rest.empty() ? "(no system message; new conversation)" : "(new conversation)");
      } else if (name == "/save") {
        save(rest);
      } else {
        fail("{}: unknown command; /help lists them", name);
      }
    } catch (const std::exception& error) {
      return report(error);
    }
    return true;
  }

  void save(const std::string& path) const {
    check(!path.empty(), "/save: found no file name");
    nlohmann::ordered_json json = nlohmann::ordered_json::array();
    for (const ChatMessage& message : session_.messages()) {
      json.push_back({{"role", message.role}, {"content", message.content}});
    }
    io::AtomicFile file(path);
    file.write(json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
    file.commit();
    note(fmt::format("({} messages saved to {})", session_.messages().size(), path));
  }

  bool terminal_;
  bool failed_ = false;
  const InterruptScope* interrupt_ = nullptr;
  ChatSession session_;
};

}  // namespace

Command add_chat(const App& parent) {
  const auto options = std::make_shared<ChatOptions>();
  const App app = parent.add_subcommand("chat", "talk with a model");
  app.footer(kFooter);
  add_model_argument(app, options->model);
  app.add_option("--system", options->system, "the system message (default: none, or the template's own)")
      .type_name("TEXT");
  app.add_option("-n,--max-tokens", options->generate.max_tokens, "tokens of an answer at most")
      .type_name("N")
      .check(at_least_one())
      .capture_default_str();
  add_sampling_options(app, options->generate.sampling);
  add_engine_options(app, options->model);
  return {app, [options] {
            check_text(options->system, "--system");
            return Chat(load_model(options->model, true), *options).run();
          }};
}

}  // namespace kilin::cli
