// SPDX-License-Identifier: Apache-2.0
// kilin quantize: a model as a GGUF file with fewer bits a weight.
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kilin/commands.h"
#include "kilin/common.h"
#include "kilin/convert_report.h"

namespace kilin::cli {
namespace {

constexpr const char* kFooter =
    R"(Bits a weight: q8_0 8.5, q4_k 4.5, q4_0 4.5 (less exact than q4_k), bf16 16.
Norms, convolutions, the router and the decay of the linear attention stay
float32, the low-rank gates bfloat16; with the 4-bit types the embedding, the
output head and the latent projections have 8 bits.

Examples:
  kilin quantize models/kilin-docs-10m docs-q8.gguf --type q8_0
  kilin quantize docs.gguf docs-q4.gguf --type q4_k)";

const std::map<std::string, WeightType> kTypes = {{"bf16", WeightType::kBF16},
                                                  {"q8_0", WeightType::kQ8_0},
                                                  {"q4_0", WeightType::kQ4_0},
                                                  {"q4_k", WeightType::kQ4_K}};

struct Options {
  std::string source, target, type;
  bool progress = false;
  ConvertOptions convert;
};

int run(const Options& options) {
  ConvertOptions chosen = options.convert;
  chosen.type = kTypes.at(options.type);
  return run_conversion("quantize", options.target, options.progress, chosen, [&](const ConvertOptions& c) {
    return convert_to_gguf(options.source, options.target, c);
  });
}

}  // namespace

Command add_quantize(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("quantize", "a GGUF file with fewer bits a weight");
  app.footer(kFooter);
  app.add_option("MODEL", options->source, "Hugging Face directory or GGUF file of a Kimi Linear model")
      .required();
  app.add_option("OUT", options->target, "GGUF file to write").required();
  std::vector<std::string> types;
  for (const auto& [name, type] : kTypes) types.push_back(name);
  app.add_option("--type", options->type, "q8_0, q4_0, q4_k or bf16")
      .type_name("TYPE")
      .required()
      .check(one_of(types));
  app.add_flag("--force", options->convert.overwrite, "overwrite OUT");
  app.add_flag("--progress", options->progress, "show progress although standard error is not a terminal");
  add_threads_option(app, options->convert.threads);
  return {app, [options] { return run(*options); }};
}

}  // namespace kilin::cli
