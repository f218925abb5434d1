// SPDX-License-Identifier: Apache-2.0
#include "train/sources.h"

#include <optional>

#include "base/error.h"
#include "eval/inputs.h"
#include "io/mapped_file.h"
#include "text/chat_template.h"
#include "train/chat_data.h"

namespace kilin::train {
namespace {

// Rows of one part of [data], "train" or "valid".
struct Part {
  const TrainConfig& config;
  const text::Tokenizer* tokenizer;
  const std::vector<std::string>& paths;
  size_t first_place;  // of `paths` in config.data.places
  const char* key;

  // Runs f(path) and puts line and key before what it throws.
  template <class F>
  auto with_place(size_t i, const F& f) const {
    try {
      return f(paths[i]);
    } catch (const Error& error) {
      fail("{}: key 'data.{}': {}", config.data.places[first_place + i], key, error.what());
    }
  }
};

std::optional<text::Tokenizer> load_tokenizer(const TrainConfig& config) {
  if (config.model.tokenizer.empty()) return std::nullopt;
  text::Tokenizer tokenizer = text::Tokenizer::load(config.model.tokenizer);
  const int64_t vocabulary = config.model.shape.vocab_size;
  check(tokenizer.vocab_size() <= vocabulary,
        "{}: key 'model.tokenizer': '{}' has {} tokens, but the model a vocabulary of {}", config.file,
        config.model.tokenizer, tokenizer.vocab_size(), vocabulary);
  return tokenizer;
}

void check_file(const TokenFile& file, const TrainConfig& config, const text::Tokenizer* tokenizer) {
  const TokenFileHeader& header = file.header();
  check(header.vocab_size <= static_cast<uint64_t>(config.model.shape.vocab_size),
        "{}: has a vocabulary of {}, but the model one of {}", file.path(), header.vocab_size,
        config.model.shape.vocab_size);
  check(tokenizer == nullptr || header.tokenizer_hash == tokenizer_hash(*tokenizer),
        "{}: was made with another tokenizer than that of '{}' (kilin tokenize makes it anew)", file.path(),
        config.model.tokenizer);
}

std::unique_ptr<RowSource> token_rows(const Part& part) {
  std::vector<std::unique_ptr<TokenStream>> streams;
  int32_t bos = -1;
  int32_t eos = -1;
  for (size_t i = 0; i < part.paths.size(); ++i) {
    part.with_place(i, [&](const std::string& path) {
      TokenFile file = TokenFile::open(path);
      check_file(file, part.config, part.tokenizer);
      const TokenFileHeader& header = file.header();
      check(i == 0 || (header.bos_id == bos && header.eos_id == eos),
            "{}: marks documents with other tokens than the file before it", path);
      bos = header.bos_id;
      eos = header.eos_id;
      streams.push_back(stream_of(std::move(file)));
      return 0;
    });
  }
  return part.with_place(0, [&](const std::string& path) {
    return std::make_unique<StreamRows>(std::move(streams), part.config.data.sequence,
                                        part.config.data.split_documents, bos, eos, path);
  });
}

std::unique_ptr<RowSource> text_rows(const Part& part) {
  const text::Tokenizer& tokenizer = *part.tokenizer;
  const int32_t bos = tokenizer.bos_id().value_or(-1);
  const int32_t eos = tokenizer.eos_id().value_or(-1);
  std::vector<std::unique_ptr<TokenStream>> streams;
  for (size_t i = 0; i < part.paths.size(); ++i) {
    part.with_place(i, [&](const std::string& path) {
      const io::MappedFile file(path);
      const auto documents = eval::split_documents(file.text(), path);
      const auto encode = [&](std::string_view text) { return tokenizer.encode(text); };
      streams.push_back(stream_of(eval::token_stream(documents, encode, bos, eos)));
      return 0;
    });
  }
  return part.with_place(0, [&](const std::string& path) {
    return std::make_unique<StreamRows>(std::move(streams), part.config.data.sequence,
                                        part.config.data.split_documents, bos, eos, path);
  });
}

std::unique_ptr<RowSource> chat_rows(const Part& part, std::vector<std::string>& notes) {
  const auto chat = text::ChatTemplate::load(part.config.model.tokenizer);
  ChatDataOptions options;
  options.max_tokens = part.config.data.sequence;
  std::vector<LabelledSequence> sequences;
  for (size_t i = 0; i < part.paths.size(); ++i) {
    part.with_place(i, [&](const std::string& path) {
      ChatData data = read_chat_data(path, *part.tokenizer, chat ? &*chat : nullptr, options);
      notes.push_back(fmt::format(
          "{}: {} examples, {} tokens, {} of them learnt, {} examples cut to {} tokens, "
          "{} left out",
          path, data.examples.size(), data.tokens, data.counted, data.cut, options.max_tokens, data.dropped));
      for (ChatExample& example : data.examples)
        sequences.push_back({std::move(example.tokens), std::move(example.labels)});
      return 0;
    });
  }
  return std::make_unique<PackedSequences>(std::move(sequences), part.config.data.sequence,
                                           part.config.run.seed);
}

std::unique_ptr<RowSource> open_part(const Part& part, std::vector<std::string>& notes) {
  if (part.paths.empty()) return nullptr;
  switch (part.config.data.kind) {
    case DataKind::kTokens:
      return token_rows(part);
    case DataKind::kText:
      return text_rows(part);
    default:
      return chat_rows(part, notes);
  }
}

}  // namespace

Sources open_sources(const TrainConfig& config) {
  const DataConfig& data = config.data;
  Sources sources;
  const auto tokenizer = load_tokenizer(config);
  if (data.kind == DataKind::kSynthetic) {
    sources.train = std::make_unique<SyntheticRows>(data.synthetic, eval::Split::kTrain, kEndlessRows,
                                                    data.examples_per_row);
    sources.valid = std::make_unique<SyntheticRows>(data.synthetic, eval::Split::kHeldOut,
                                                    static_cast<uint64_t>(data.valid_sequences));
    return sources;
  }
  const text::Tokenizer* used = tokenizer ? &*tokenizer : nullptr;
  sources.train = open_part({config, used, data.train, 0, "train"}, sources.notes);
  sources.valid = open_part({config, used, data.valid, data.train.size(), "valid"}, sources.notes);
  return sources;
}

}  // namespace kilin::train
