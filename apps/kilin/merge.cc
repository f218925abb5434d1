// SPDX-License-Identifier: Apache-2.0
// kilin merge: a model with a LoRA adapter added to its weights.
#include <memory>
#include <string>

#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/convert_report.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(OUT becomes a Hugging Face directory of the model with s B A added to every matrix
that the adapter names; s is lora_alpha / r (or / sqrt(r) with use_rslora), times
SCALE. Weights keep their types with --type auto; quantised ones become bfloat16.
The sum is rounded once. 'kilin run MODEL --lora ADAPTER' computes with the sum as
float32 and writes nothing.

Examples:
  kilin merge models/kilin-docs-10m adapter merged
  kilin merge models/kilin-docs-10m adapter:0.5 merged --type f32)";

struct Options {
  std::string model, adapter, target;
  std::string type = "auto";
  bool progress = false;
  ConvertOptions convert;
};

int run(const Options& options) {
  ConvertOptions chosen = options.convert;
  chosen.type = options.type == "f32"    ? WeightType::kF32
                : options.type == "bf16" ? WeightType::kBF16
                                         : WeightType::kAuto;
  const LoraSource adapter = lora_source(options.adapter);
  return run_conversion("merge", options.target, options.progress, chosen, [&](const ConvertOptions& c) {
    return merge_lora(options.model, adapter, options.target, c);
  });
}

}  // namespace

Command add_merge(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("merge", "add a LoRA adapter to a model's weights");
  app.footer(kFooter);
  app.add_option("MODEL", options->model, "Hugging Face directory or GGUF file of a Kimi Linear model")
      .required();
  app.add_option("ADAPTER", options->adapter, "directory of a LoRA adapter, or DIR:SCALE").required();
  app.add_option("OUT", options->target, "Hugging Face directory to write").required();
  app.add_option("--type", options->type, "of the matrices: auto (as they are), f32 or bf16")
      .type_name("TYPE")
      .check(one_of({"auto", "f32", "bf16"}))
      .capture_default_str();
  app.add_flag("--force", options->convert.overwrite, "overwrite OUT");
  app.add_flag("--progress", options->progress, "show progress although standard error is not a terminal");
  add_threads_option(app, options->convert.threads);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
