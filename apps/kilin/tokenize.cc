// SPDX-License-Identifier: Apache-2.0
// kilin tokenize: texts as a token file, which training reads.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "eval/inputs.h"
#include "io/mapped_file.h"
#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/format.h"
#include "kilin/interrupt.h"
#include "kilin/output.h"
#include "kilin/progress.h"
#include "train/token_file.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(The documents of --text (parted by a form feed) and of --jsonl (one record per
line) are encoded each on its own and written as [BOS] document [EOS], one
after the other, with 2 bytes a token (4 for vocabularies above 65,536).
Training refuses a file made with another tokenizer than its model's.

Examples:
  kilin tokenize models/kilin-docs-10m --text a.txt b.txt --out corpus.kbin
  xz -dc train.txt.xz | kilin tokenize models/kilin-docs-10m --text - --out train.kbin
  kilin tokenize models/kilin-docs-10m --jsonl pages.jsonl --field body --out pages.kbin)";

constexpr size_t kBatchBytes = size_t{4} << 20;  // of documents that are encoded at once

struct Options {
  std::string model;
  std::vector<std::string> texts, jsonl;
  std::string field = "text";
  std::string out;
  int threads = 0;
  bool json = false;
  bool progress = false;
};

struct Input {
  std::string path;
  bool jsonl;
};

class TokenizeRun {
 public:
  explicit TokenizeRun(const Options& options)
      : options_(options),
        tokenizer_(text::Tokenizer::load(options.model)),
        pool_(options.threads > 0 ? options.threads : physical_cores()),
        writer_(options.out, header()) {}

  int run() {
    const InterruptScope interrupt;
    const Stopwatch clock;
    std::vector<Input> inputs;
    for (const std::string& path : options_.texts) inputs.push_back({path, false});
    for (const std::string& path : options_.jsonl) inputs.push_back({path, true});
    for (const Input& input : inputs) {
      if (!add(input, interrupt)) {
        log_line("interrupted, nothing is written");
        return kInterruptedExit;
      }
    }
    writer_.commit();
    print(clock.seconds());
    return 0;
  }

 private:
  train::TokenFileHeader header() const {
    train::TokenFileHeader header;
    header.vocab_size = static_cast<uint64_t>(tokenizer_.vocab_size());
    header.tokenizer_hash = train::tokenizer_hash(tokenizer_);
    header.bos_id = tokenizer_.bos_id().value_or(-1);
    header.eos_id = tokenizer_.eos_id().value_or(-1);
    return header;
  }

  bool add(const Input& input, const InterruptScope& interrupt) {
    const std::string content = read_input(input.path);
    const std::vector<std::string> documents = input.jsonl
                                                   ? eval::parse_jsonl(content, options_.field, input.path)
                                                   : eval::split_documents(content, input.path);
    Progress progress("tokenize " + input.path, static_cast<int64_t>(content.size()), "bytes",
                      options_.progress || progress_by_default());
    int64_t done = 0;
    for (size_t first = 0; first < documents.size();) {
      size_t end = first;
      size_t bytes = 0;
      while (end < documents.size() && bytes < kBatchBytes) bytes += documents[end++].size() + 1;
      encode({documents.begin() + static_cast<std::ptrdiff_t>(first),
              documents.begin() + static_cast<std::ptrdiff_t>(end)});
      first = end;
      done += static_cast<int64_t>(bytes);
      progress.update(std::min(done, static_cast<int64_t>(content.size())));
      if (interrupt.interrupted()) return false;
    }
    bytes_ += content.size();
    return true;
  }

  void encode(std::span<const std::string> documents) {
    std::vector<std::vector<int32_t>> ids(documents.size());
    pool_.parallel_for(static_cast<int64_t>(documents.size()), [&](int64_t index, int) {
      const auto i = static_cast<size_t>(index);
      const auto encode_one = [&](std::string_view text) { return tokenizer_.encode(text); };
      ids[i] = eval::token_stream(documents.subspan(i, 1), encode_one, writer_.header().bos_id,
                                  writer_.header().eos_id);
    });
    for (const auto& document : ids) writer_.add_document(document);
  }

  void print(double seconds) const {
    const train::TokenFileHeader& header = writer_.header();
    if (options_.json) {
      nlohmann::ordered_json object;
      object["tokens"] = header.tokens;
      object["documents"] = header.documents;
      object["bytes"] = bytes_;
      object["seconds"] = seconds;
      write_json_line(object);
      return;
    }
    write_out(fmt::format("{}: {} tokens in {} documents, of {} bytes of input\n", options_.out,
                          with_commas(static_cast<int64_t>(header.tokens)),
                          with_commas(static_cast<int64_t>(header.documents)),
                          with_commas(static_cast<int64_t>(bytes_))));
    log_line(fmt::format("{} ({} tokens/s)", human_duration(seconds),
                         human_rate(static_cast<double>(header.tokens) / seconds)));
  }

  const Options& options_;
  text::Tokenizer tokenizer_;
  ThreadPool pool_;
  train::TokenFileWriter writer_;
  uint64_t bytes_ = 0;
};

int run(const Options& options) {
  if (options.texts.empty() && options.jsonl.empty()) throw UsageError("--text or --jsonl is needed");
  return TokenizeRun(options).run();
}

}  // namespace

Command add_tokenize(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("tokenize", "texts as a token file for training");
  app.footer(kFooter);
  app.add_option("MODEL", options->model, "directory with the tokenizer").required();
  app.add_option("--text", options->texts, "texts, documents parted by a form feed; -: standard input")
      .type_name("FILE...");
  app.add_option("--jsonl", options->jsonl,
                 "files with a JSON object per line, each record's text a document")
      .type_name("FILE...");
  app.add_option("--field", options->field, "the key of the text in --jsonl")
      .type_name("NAME")
      .capture_default_str();
  app.add_option("--out", options->out, "token file to write")
      .type_name("FILE")
      .required()
      .check(not_empty());
  app.add_flag("--progress", options->progress, "show progress although standard error is not a terminal");
  app.add_flag("--json", options->json, "print one JSON object");
  add_threads_option(app, options->threads);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
