// SPDX-License-Identifier: Apache-2.0
// kilin eval classification, choice and extraction: records of a JSONL file.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "eval/records.h"
#include "eval/tasks.h"
#include "io/atomic_file.h"
#include "kilin/eval_tasks.h"
#include "kilin/format.h"
#include "kilin/model_source.h"

namespace kilin::cli {
namespace {

constexpr const char* kInput =
    R"(A record is a JSON object on a line. What the model reads is "prompt" (or "text"),
or "messages" for the chat template; with --chat a prompt becomes the user's
message. Without a template the beginning token goes in front, unless the prompt
begins with a special token. Prompt and answer are encoded each on its own.
)";

struct Options {
  ModelArguments model;
  std::string jsonl;
  bool chat = false;
  std::string system;
  std::optional<std::string> delimiter;
  int64_t limit = 0;
  std::string output;
  std::vector<std::string> labels;  // classification
  int64_t max_tokens = 64;          // extraction
  int64_t batch = 16;
  std::vector<std::string> stop;
  ReportOptions report;
};

// Records as tokens of one model.
class Encoder {
 public:
  Encoder(const Model& model, const Options& options) : model_(model), options_(options) {}

  std::vector<int32_t> context(const eval::Record& record) const {
    const bool chat = options_.chat || !record.messages.empty();
    if (!chat) return plain(record.prompt);
    std::vector<ChatMessage> messages;
    const bool has_system = !record.messages.empty() && record.messages.front().role == "system";
    if (!options_.system.empty() && !has_system) messages.push_back({"system", options_.system});
    for (const eval::Message& m : record.messages) messages.push_back({m.role, m.content});
    if (record.messages.empty()) messages.push_back({"user", record.prompt});
    return model_.encode(model_.chat_prompt(messages));
  }

  std::vector<int32_t> answer(const eval::Record& record, const std::string& text) const {
    const bool chat = options_.chat || !record.messages.empty();
    const std::string space =
        options_.delimiter ? *options_.delimiter : record.delimiter.value_or(chat ? "" : " ");
    return model_.encode(space + text);
  }

 private:
  std::vector<int32_t> plain(const std::string& prompt) const {
    std::vector<int32_t> ids = model_.encode(prompt);
    if (model_.bos_id() >= 0 && !begins_with_special(model_, ids)) ids.insert(ids.begin(), model_.bos_id());
    return ids;
  }

  const Model& model_;
  const Options& options_;
};

std::vector<eval::Record> read_records(const Options& options, eval::RecordKind kind) {
  if (!options.system.empty()) check_text(options.system, "--system");
  auto records = eval::parse_records(read_input(options.jsonl), kind, options.jsonl);
  if (options.limit > 0 && static_cast<int64_t>(records.size()) > options.limit) {
    records.erase(records.begin() + options.limit, records.end());
  }
  return records;
}

std::string place_of(const Options& options, const eval::Record& record) {
  return fmt::format("{}:{}", options.jsonl, record.line);
}

// A line of --output per record.
class ResultFile {
 public:
  explicit ResultFile(const std::string& path) {
    if (!path.empty()) file_.emplace(path);
  }
  void add(const nlohmann::ordered_json& line) {
    if (file_)
      file_->write(line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n");
  }
  void commit() {
    if (file_) file_->commit();
  }

 private:
  std::optional<io::AtomicFile> file_;
};

void put(nlohmann::ordered_json& json, const std::string& name, const eval::Mean& mean) {
  json[name] = mean.value;
  json[name + "_stderr"] = mean.standard_error;
}

std::vector<std::string> classes_of(const Options& options, const std::vector<eval::Record>& records) {
  std::vector<std::string> labels = options.labels.empty() ? eval::labels_of(records) : options.labels;
  std::sort(labels.begin(), labels.end());
  labels.erase(std::unique(labels.begin(), labels.end()), labels.end());
  check(labels.size() >= 2, "{}: found {} label, expected at least two (--label names others)", options.jsonl,
        labels.size());
  for (const eval::Record& record : records) {
    const bool known = std::binary_search(labels.begin(), labels.end(), record.answers.front());
    check(known, "{}: found label '{}', expected one of those that --label names", place_of(options, record),
          record.answers.front());
  }
  return labels;
}

std::vector<eval::Question> label_questions(const Encoder& encoder, const Options& options,
                                            const std::vector<eval::Record>& records,
                                            const std::vector<std::string>& labels) {
  std::vector<eval::Question> questions;
  for (const eval::Record& record : records) {
    eval::Question q{place_of(options, record), encoder.context(record), {}, {}, 0};
    for (const std::string& label : labels) q.continuations.push_back(encoder.answer(record, label));
    q.right = static_cast<int32_t>(std::lower_bound(labels.begin(), labels.end(), record.answers.front()) -
                                   labels.begin());
    questions.push_back(std::move(q));
  }
  return questions;
}

TaskReport classification_report(const eval::ClassificationScore& score,
                                 const std::vector<std::string>& labels, size_t count) {
  TaskReport report;
  report.done = static_cast<int64_t>(count);
  report.json["task"] = "classification";
  report.json["records"] = count;
  put(report.json, "accuracy", score.accuracy);
  put(report.json, "macro_f1", score.macro_f1);
  report.text = fmt::format("accuracy {}   macro F1 {}   {} records\n", percent_with_error(score.accuracy),
                            percent_with_error(score.macro_f1), with_commas(report.done));
  size_t width = 5;
  for (const std::string& label : labels) width = std::max(width, label.size());
  report.text += fmt::format("{:{}}  precision  recall      F1  records  predicted\n", "label", width);
  for (size_t i = 0; i < labels.size(); ++i) {
    const eval::ClassScore& c = score.classes[i];
    report.json["classes"].push_back({{"label", labels[i]},
                                      {"precision", c.precision},
                                      {"recall", c.recall},
                                      {"f1", c.f1},
                                      {"records", c.support},
                                      {"predicted", c.predicted}});
    report.text += fmt::format("{:{}}  {:9.4f}  {:6.4f}  {:6.4f}  {:7}  {:9}\n", labels[i], width,
                               c.precision, c.recall, c.f1, c.support, c.predicted);
  }
  return report;
}

int run_classification(const Options& options) {
  const auto records = read_records(options, eval::RecordKind::kLabel);
  const auto labels = classes_of(options, records);
  const Model model = load_model(options.model, true);
  const auto questions = label_questions(Encoder(model, options), options, records, labels);
  ModelSource source(model);
  ResultFile file(options.output);
  return run_task("classification", "records", static_cast<int64_t>(questions.size()), options.report,
                  [&](const auto& progress) {
                    const auto result = eval::answer_choices(source, questions, progress);
                    std::vector<int32_t> right;
                    for (size_t i = 0; i < result.predicted.size(); ++i) {
                      right.push_back(questions[i].right);
                      nlohmann::ordered_json likelihoods;
                      for (size_t k = 0; k < labels.size(); ++k)
                        likelihoods[labels[k]] = result.log_likelihoods[i][k];
                      file.add({{"line", records[i].line},
                                {"label", labels[static_cast<size_t>(right.back())]},
                                {"predicted", labels[static_cast<size_t>(result.predicted[i])]},
                                {"log_likelihoods", likelihoods}});
                    }
                    file.commit();
                    const auto score =
                        eval::score_classes(right, result.predicted, static_cast<int32_t>(labels.size()));
                    return classification_report(score, labels, right.size());
                  });
}

std::vector<eval::Question> choice_questions(const Encoder& encoder, const Options& options,
                                             const std::vector<eval::Record>& records) {
  std::vector<eval::Question> questions;
  for (const eval::Record& record : records) {
    eval::Question q{
        place_of(options, record), encoder.context(record), {}, {}, static_cast<int32_t>(record.right)};
    for (const std::string& choice : record.choices) {
      q.continuations.push_back(encoder.answer(record, choice));
      q.lengths.push_back(static_cast<double>(choice.size()));
    }
    questions.push_back(std::move(q));
  }
  return questions;
}

int run_choice(const Options& options) {
  const auto records = read_records(options, eval::RecordKind::kChoice);
  const Model model = load_model(options.model, true);
  const auto questions = choice_questions(Encoder(model, options), options, records);
  ModelSource source(model);
  ResultFile file(options.output);
  return run_task(
      "choice", "records", static_cast<int64_t>(questions.size()), options.report, [&](const auto& progress) {
        const auto result = eval::answer_choices(source, questions, progress);
        for (size_t i = 0; i < result.predicted.size(); ++i) {
          file.add({{"line", records[i].line},
                    {"answer", questions[i].right},
                    {"predicted", result.predicted[i]},
                    {"predicted_norm", result.predicted_normalized[i]},
                    {"log_likelihoods", result.log_likelihoods[i]}});
        }
        file.commit();
        const auto by_sum = eval::accuracy_of(questions, result.predicted);
        const auto by_byte = eval::accuracy_of(questions, result.predicted_normalized);
        TaskReport report;
        report.done = static_cast<int64_t>(result.predicted.size());
        report.json["task"] = "choice";
        report.json["records"] = report.done;
        put(report.json, "accuracy", by_sum);
        put(report.json, "accuracy_norm", by_byte);
        report.text =
            fmt::format("accuracy {}   by log likelihood per byte {}   {} records\n",
                        percent_with_error(by_sum), percent_with_error(by_byte), with_commas(report.done));
        return report;
      });
}

std::string trimmed(const std::string& text) {
  constexpr const char* kSpace = " \t\r\n";
  const size_t begin = text.find_first_not_of(kSpace);
  return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(kSpace) + 1 - begin);
}

TaskReport extraction_report(const std::vector<double>& exact, const std::vector<double>& f1) {
  TaskReport report;
  report.done = static_cast<int64_t>(exact.size());
  report.json["task"] = "extraction";
  report.json["records"] = report.done;
  put(report.json, "exact_match", eval::mean_of(exact));
  put(report.json, "f1", eval::mean_of(f1));
  report.text = fmt::format("exact match {}   F1 {}   {} records\n", percent_with_error(eval::mean_of(exact)),
                            percent_with_error(eval::mean_of(f1)), with_commas(report.done));
  return report;
}

int run_extraction(const Options& options) {
  const auto records = read_records(options, eval::RecordKind::kAnswer);
  for (const std::string& stop : options.stop) check_text(stop, "--stop");
  const Model model = load_model(options.model, true);
  const Encoder encoder(model, options);
  std::vector<eval::Question> questions;
  for (const eval::Record& r : records)
    questions.push_back({place_of(options, r), encoder.context(r), {}, {}, 0});
  ModelGenerator generator(model, options.stop);
  ResultFile file(options.output);
  return run_task("extraction", "records", static_cast<int64_t>(questions.size()), options.report,
                  [&](const auto& progress) {
                    const auto texts = eval::answer_freely(generator, questions, options.max_tokens,
                                                           options.batch, progress);
                    std::vector<double> exact, f1;
                    for (size_t i = 0; i < texts.size(); ++i) {
                      const std::string predicted = trimmed(generator.text_of(texts[i]));
                      const auto score = eval::score_answer(predicted, records[i].answers);
                      exact.push_back(score.exact);
                      f1.push_back(score.f1);
                      file.add({{"line", records[i].line},
                                {"answers", records[i].answers},
                                {"predicted", predicted},
                                {"exact", score.exact},
                                {"f1", score.f1}});
                    }
                    file.commit();
                    return extraction_report(exact, f1);
                  });
}

void add_record_options(const App& app, Options& options) {
  add_model_argument(app, options.model);
  const auto add = [&](const char* name, auto& value, const char* type, const char* text) {
    return app.add_option(name, value, text).type_name(type).group("Input");
  };
  add("--jsonl", options.jsonl, "FILE", "the records; -: standard input").required();
  app.add_flag("--chat", options.chat, "a prompt is a user's message, in the model's chat template")
      .group("Input");
  add("--system", options.system, "TEXT", "a system message before each conversation without one");
  add("--limit", options.limit, "N", "only the first N records").check(at_least_one());
  add("--output", options.output, "FILE", "write what the model answered, a JSON object per record");
  add_report_options(app, options.report);
  add_engine_options(app, options.model);
}

void add_delimiter(const App& app, Options& options) {
  app.add_option("--delimiter", options.delimiter,
                 "what stands between prompt and answer (default: a space; nothing in conversations; where "
                 "the record "
                 "has a completion, the white space that it begins with)")
      .type_name("TEXT")
      .group("Input");
}

}  // namespace

Command add_classification(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app =
      parent.add_subcommand("classification", "accuracy and F1 of labels, chosen by log likelihood");
  app.footer(std::string(kInput) +
             R"(The answer is "label", "completion" or the last of the messages. The prediction
is the label that is most likely behind the prompt, of all that occur in the file
or that --label names. Macro F1 is the mean over the labels that occur or are
predicted.

Examples:
  kilin eval classification models/kilin-docs-10m --jsonl valid.jsonl --chat
  kilin eval classification models/kilin-docs-10m --jsonl valid.jsonl --lora adapter --json)");
  add_record_options(app, *options);
  add_delimiter(app, *options);
  app.add_option("--label", options->labels,
                 "a label to choose from; given once for each (default: those in the file)")
      .type_name("TEXT")
      .check(not_empty())
      .one_value_each()
      .group("Input");
  return {app, [options] { return run_classification(*options); }};
}

Command add_choice(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("choice", "accuracy in multiple choice, by log likelihood");
  app.footer(std::string(kInput) +
             R"("choices" are texts, "answer" is the number of the right one, from 0, or its
text. The prediction is the choice that is most likely behind the prompt; a second
figure divides the log likelihood by the bytes of the choice first.

Example:
  kilin eval choice models/kilin-docs-10m --jsonl questions.jsonl --json)");
  add_record_options(app, *options);
  add_delimiter(app, *options);
  return {app, [options] { return run_choice(*options); }};
}

Command add_extraction(const App& parent) {
  const auto options = std::make_shared<Options>();
  const App app = parent.add_subcommand("extraction", "exact match and F1 of generated answers");
  app.footer(std::string(kInput) + R"(The answer is "answer" (a text, or a list of texts that are all right),
"completion" or the last of the messages. The model answers greedily; answers are
compared as in SQuAD: lower case, without punctuation, a, an and the; F1 is that
of the words.

Examples:
  kilin eval extraction models/kilin-docs-10m --jsonl valid.jsonl --chat
  kilin eval extraction models/kilin-docs-10m --jsonl valid.jsonl --stop $'\n' -n 32)");
  add_record_options(app, *options);
  app.add_option("-n,--max-tokens", options->max_tokens, "tokens of an answer at most")
      .type_name("N")
      .check(at_least_one())
      .capture_default_str();
  app.add_option("--stop", options->stop, "an answer ends before this text; may be given several times")
      .type_name("TEXT")
      .check(not_empty())
      .one_value_each();
  app.add_option("--batch", options->batch, "answers that are generated at once")
      .type_name("N")
      .check(in_range(1, 4096, "a whole number from 1 to 4096"))
      .capture_default_str();
  return {app, [options] { return run_extraction(*options); }};
}

}  // namespace kilin::cli
