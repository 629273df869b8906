#include "plan.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "plan_search.h"

namespace lstm_ext::cuda {
namespace {

// How far a layer is from one that was measured: 1 stands for twice the batch, 1.4 times the units or 16 times the
// steps. Beyond kFarthest a measurement tells nothing.
constexpr double kFarthest = 1;
double distance(const MeasuredTimes& measured, const SequenceShape& shape) {
  const auto octaves = [](int64_t a, int64_t b) { return std::abs(std::log2(double(std::max<int64_t>(a, 1)) / b)); };
  return octaves(shape.T, planned_steps(measured.T)) / 4 + octaves(shape.B, measured.B) +
         2 * octaves(shape.H, measured.H) + (shape.projected ? 2 * octaves(shape.P, measured.P) : 0);
}

// The nearest one, the first of equals; null where none is near.
const MeasuredTimes* nearest(const Problem& problem) {
  if (!problem.measured) return nullptr;
  const MeasuredTimes* found = nullptr;
  double least = kFarthest;
  for (const MeasuredTimes& each : *problem.measured) {
    const bool of_its_kind = each.arithmetic == problem.arithmetic && each.directions == problem.directions &&
                             each.backward == problem.backward && (each.P > 0) == problem.shape.projected;
    if (!of_its_kind) continue;
    const double far = distance(each, problem.shape);
    if (far < least || (far == least && !found)) {
      found = &each;
      least = far;
    }
  }
  return found;
}

std::string text_of(const MeasuredTimes& measured) {
  return "measured at T" + std::to_string(measured.T) + " B" + std::to_string(measured.B) + " H" +
         std::to_string(measured.H) + (measured.P ? " P" + std::to_string(measured.P) : "") + " on " + measured.date;
}

// Strategies that can run a layer, with the time of the whole layer by which one is chosen.
using Possible = std::vector<std::pair<Plan, double>>;

// Puts what was measured in place of what is predicted. Predictions are not held against measurements: the others come
// last, and are taken where nothing that was measured can run.
void use_measured(Possible& possible, const MeasuredTimes& measured, int64_t T) {
  const auto of = [&](Strategy strategy) {
    return std::find_if(measured.microseconds.begin(), measured.microseconds.end(),
                        [&](const auto& each) { return each.first == strategy; });
  };
  const auto was_measured = [&](const auto& each) { return of(each.first.strategy) != measured.microseconds.end(); };
  const auto rest = std::stable_partition(possible.begin(), possible.end(), was_measured);
  for (auto each = possible.begin(); each != rest; ++each) {
    each->first.microseconds = of(each->first.strategy)->second;
    each->first.source = text_of(measured);
    each->second = each->first.microseconds * T;
  }
}

// Why another strategy was not taken.
std::string slower(const Plan& other, const Plan& chosen) {
  const bool by_measurement = chosen.source != "model";
  if (other.source != chosen.source) return "not " + chosen.source + ", as " + name_of(chosen.strategy) + " was";
  char text[96];
  std::snprintf(text, sizeof(text), "%s %.2f us a step, %s %.2f", by_measurement ? "measured" : "predicted",
                other.microseconds, name_of(chosen.strategy), chosen.microseconds);
  return text;
}

// The first of the fastest, among those that know their time from the same source as the first.
const Plan& fastest(const Possible& possible) {
  const std::pair<Plan, double>* chosen = &possible[0];
  for (const auto& each : possible)
    if (each.first.source == chosen->first.source && each.second < chosen->second) chosen = &each;
  return chosen->first;
}

constexpr int kMarginUnset = -1;
std::atomic<int> margin{kMarginUnset};

int margin_of_environment() {
  const char* text = std::getenv("LSTM_EXT_SM_MARGIN");
  if (!text || !*text) return 0;
  int value = 0;
  const char* const end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, value);
  if (error != std::errc() || stop != end || value < 0)
    throw std::invalid_argument("LSTM_EXT_SM_MARGIN: expected a number of multiprocessors from 0 on, got '" +
                                std::string(text) + "'");
  return value;
}

}  // namespace

Arithmetic arithmetic_of(Dtype dtype, bool tf32, int compute_capability) {
  switch (dtype) {
    case Dtype::kBFloat16: return Arithmetic::kBf16;
    case Dtype::kFloat16: return Arithmetic::kFp16;
    case Dtype::kFloat32: return tf32 && compute_capability >= 80 ? Arithmetic::kTf32 : Arithmetic::kFp32;
    case Dtype::kFloat64: return Arithmetic::kFp64;
  }
  throw std::logic_error("arithmetic_of: no such dtype");
}

CellTraits CellTraits::of(const Cell& cell) {
  const bool drops_h = cell.training && cell.recurrent_dropout > 0;
  const int draws = cell.training
                        ? (cell.zoneout_h > 0) + (cell.zoneout_c > 0) + (cell.candidate_dropout > 0) + (drops_h ? 1 : 0)
                        : 0;
  return {cell.tensorflow, cell.zoneout_h > 0, drops_h, draws, cell.norm};
}

Forced forced_by(const std::string& text) {
  if (text.empty()) return {};
  Forced forced;
  const std::string name = text.substr(0, text.find('/'));
  const auto* known = std::find(std::begin(kStrategyNames), std::end(kStrategyNames), name);
  if (known != std::end(kStrategyNames)) forced.strategy = static_cast<Strategy>(known - std::begin(kStrategyNames));
  if (name.size() < text.size()) {
    std::string tiles = text.substr(name.size() + 1);
    if (name == "step" && tiles.ends_with("/32")) {
      forced.row_threads = 32;
      tiles.resize(tiles.size() - 3);
    }
    forced.batch_tiles = tiles == "1" ? 1 : tiles == "2" ? 2 : tiles == "4" ? 4 : tiles == "8" ? 8 : 0;
    if (!forced.batch_tiles) forced.strategy = {};
  }
  if (forced.strategy) return forced;
  throw std::invalid_argument("strategy: expected 'block', 'cluster', 'grid' or 'step', got '" + text + "'");
}

int sm_margin() {
  if (margin == kMarginUnset) margin = margin_of_environment();
  return margin;
}

void set_sm_margin(int wanted) { margin = wanted; }

int64_t planned_steps(int64_t T) {
  const int shift = std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(T))) - 2);
  return T >> shift << shift;
}

Plan make_plan(const Problem& asked, const Forced& forced) {
  Problem problem = asked;
  problem.shape.T = planned_steps(asked.shape.T);
  const auto wanted = [&](Strategy one) { return !forced.strategy || *forced.strategy == one; };
  if (forced.batch_tiles && !has_tiles(problem, *forced.strategy == Strategy::kStep, forced.batch_tiles))
    throw std::runtime_error("strategy: no kernel has so many tiles of the batch");
  Possible possible;
  std::vector<std::pair<Strategy, std::string>> refused;
  bool by_refusal = false;
  for (const Strategy one : {Strategy::kBlock, Strategy::kCluster, Strategy::kGrid, Strategy::kStep}) {
    if (!wanted(one)) continue;
    Found found = one == Strategy::kStep ? find_step_plan(problem, forced) : find_sequence_plan(problem, forced, one);
    if (found.plan) {
      possible.emplace_back(std::move(*found.plan), found.time);
    } else {
      by_refusal = by_refusal || found.was_refused;
      refused.emplace_back(one, std::move(found.why));
    }
  }
  if (possible.empty()) {
    std::string text = "strategy: " + (forced.strategy ? "'" + std::string(name_of(*forced.strategy)) + "'" : "none");
    for (const auto& [each, why] : refused)
      text += (&why == &refused[0].second ? (forced.strategy ? " cannot run this: " : " can run this: ") : "; ") +
              (forced.strategy ? "" : std::string(name_of(each)) + ": ") + why;
    if (by_refusal) throw RefusedError(text);
    throw std::runtime_error(text);
  }
  if (const MeasuredTimes* measured = nearest(problem)) use_measured(possible, *measured, problem.shape.T);
  Plan plan = fastest(possible);
  for (const auto& [other, time] : possible) {
    if (other.strategy != plan.strategy) refused.emplace_back(other.strategy, slower(other, plan));
  }
  plan.refused = refused;
  return plan;
}

}  // namespace lstm_ext::cuda
