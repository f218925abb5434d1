// SPDX-License-Identifier: Apache-2.0
// kilin convert: between Hugging Face directories and GGUF files.
#include <memory>
#include <string>

#include "base/error.h"
#include "io/gguf.h"
#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/convert_report.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(A GGUF file becomes a Hugging Face directory, anything else a GGUF file. Weights
keep their types with --type auto; quantised ones become bfloat16 in a directory.
Tokenizer, chat template and generation configuration go along. llama.cpp runs
such files too, unless a note says otherwise. 'kilin quantize' makes smaller ones.

With --random IN is a config.json: a file of random weights without a tokenizer,
for measuring speed.

Examples:
  kilin convert models/kilin-docs-10m docs.gguf
  kilin convert docs.gguf docs-again
  kilin convert --random configs/bench/twelve-layers.json bench.gguf)";

struct Options {
  std::string source, target;
  std::string type = "auto";
  bool random = false;
  uint64_t seed = 0;
  bool seed_given = false;
  bool progress = false;
  ConvertOptions convert;
};

ConvertReport convert(const Options& options, const ConvertOptions& convert) {
  if (options.random) return random_gguf(options.source, options.seed, options.target, convert);
  if (io::GgufFile::is_gguf(options.source)) {
    check(!options.target.ends_with(".gguf"),
          "{}: a GGUF file becomes a directory, expected the name of one (kilin quantize makes GGUF files of "
          "GGUF files)",
          options.target);
    return convert_to_hugging_face(options.source, options.target, convert);
  }
  return convert_to_gguf(options.source, options.target, convert);
}

int run(const Options& options) {
  if (options.seed_given && !options.random) throw UsageError("--seed is for --random only");
  ConvertOptions chosen = options.convert;
  chosen.type = options.type == "f32"    ? WeightType::kF32
                : options.type == "bf16" ? WeightType::kBF16
                                         : WeightType::kAuto;
  return run_conversion("convert", options.target, options.progress, chosen,
                        [&](const ConvertOptions& c) { return convert(options, c); });
}

}  // namespace

Command add_convert(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("convert", "between Hugging Face directories and GGUF files");
  app.footer(kFooter);
  app.add_option("IN", options->source, "Hugging Face directory, GGUF file, or config.json with --random")
      .required();
  app.add_option("OUT", options->target, "GGUF file or Hugging Face directory to write").required();
  app.add_option("--type", options->type, "of the matrices: auto (as they are), f32 or bf16")
      .type_name("TYPE")
      .check(one_of({"auto", "f32", "bf16"}))
      .capture_default_str();
  app.add_flag("--random", options->random, "random weights for the shape in a config.json");
  const Option seed = app.add_option("--seed", options->seed, "of the random weights")
                          .type_name("N")
                          .check(seed_number())
                          .capture_default_str();
  app.add_flag("--force", options->convert.overwrite, "overwrite OUT");
  app.add_flag("--progress", options->progress, "show progress although standard error is not a terminal");
  add_threads_option(app, options->convert.threads);
  return {app, [options, seed] {
            options->seed_given = seed.count() > 0;
            return run(*options);
          }};
}

}  // namespace kilin::cli
