#include "cpu_plan.h"

#include <optional>

#include "../cpu/levels.h"
#include "../cpu/team.h"
#include "../sizes.h"

namespace lstm_ext::ops {
namespace {

cpu::EngineKind engine_named(const std::string& name) {
  if (name == "vectors") return cpu::EngineKind::kVectors;
  if (name == "tiles") return cpu::EngineKind::kTiles;
  throw py::value_error("engine: expected vectors or tiles, got '" + name + "'");
}

std::optional<bool> bool_of(const py::handle& value, const char* name) {
  if (value.is_none()) return {};
  if (!py::isinstance<py::bool_>(value)) throw py::type_error(std::string(name) + ": expected a bool or None");
  return py::cast<bool>(value);
}

std::optional<int64_t> int_of(const py::handle& value, const char* name) {
  if (value.is_none()) return {};
  if (!py::isinstance<py::int_>(value)) throw py::type_error(std::string(name) + ": expected an int or None");
  return py::cast<int64_t>(value);
}

void expect_at_least(int64_t least, int64_t value, const char* name) {
  if (value >= least) return;
  throw py::value_error(std::string(name) + ": expected at least " + std::to_string(least) + ", got " +
                        std::to_string(value));
}

}  // namespace

int threads_for(const LayerArgs& args, int asked) {
  if (asked <= 0 && cpu::is_brief(args.shape)) return 1;
  if (asked <= 0) asked = args.x.num_threads();
  return asked > 0 ? asked : cpu::default_threads();
}

py::dict cpu_plan(int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, bool projected, const std::string& dtype,
                  int num_directions, bool backward, int num_threads) {
  expect_at_least(0, I, "I");
  expect_at_least(1, H, "H");
  expect_at_least(projected ? 1 : 0, P, "P");
  if (num_directions != 1 && num_directions != 2) throw py::value_error("num_directions: expected 1 or 2");
  const SequenceShape shape{T, B, I, H, projected ? P : H, projected};
  cpu::Problem problem{dtype_named(dtype), shape, num_directions, backward,
                       num_threads ? num_threads : cpu::default_threads()};
  problem.simple = !projected && !backward;  // without masks
  return described_plan(problem);
}

py::dict described_plan(const cpu::Problem& problem) {
  const SequenceShape& shape = problem.shape;
  expect_at_least(1, shape.T, "T");
  expect_at_least(0, shape.B, "B");
  expect_at_least(0, problem.num_threads, "num_threads");
  expect_countable(shape, saturated_product(shape.T, shape.B));
  const cpu::Plan plan = cpu::make_plan(problem, cpu::kernels().shape);
  py::dict why, result;
  why["engine"] = plan.why.engine;
  why["chunk_steps"] = plan.why.chunk_steps;
  why["threads"] = plan.why.threads;
  result["engine"] = plan.engine == cpu::EngineKind::kTiles ? "tiles" : "vectors";
  result["in_place"] = py::make_tuple(plan.in_place[0], plan.in_place[1], plan.in_place[2]);
  result["one_sum"] = plan.one_sum;
  result["alone"] = plan.alone;
  result["chunk_steps"] = plan.chunk_steps;
  result["depth"] = py::make_tuple(plan.depth[0], plan.depth[1]);
  result["borrow_x"] = plan.borrow_x;
  result["threads"] = plan.threads;
  result["by_rows"] = plan.by_rows;
  result["why"] = why;
  return result;
}

void force_cpu_plan(const py::object& engine, const py::object& in_place, const py::object& one_sum,
                    const py::object& chunk_steps, const py::object& depth, const py::object& threads,
                    const py::object& by_rows) {
  cpu::Forced forced;
  if (!engine.is_none()) forced.engine = engine_named(py::cast<std::string>(engine));
  if (py::isinstance<py::tuple>(in_place)) {
    const py::tuple each(in_place);
    if (each.size() != 3) throw py::value_error("in_place: expected one bool, or those of w_ih, w_hh and w_hr");
    for (size_t n = 0; n < 3; ++n) forced.in_place[n] = bool_of(each[n], "in_place");
  } else {
    for (auto& each : forced.in_place) each = bool_of(in_place, "in_place");
  }
  forced.one_sum = bool_of(one_sum, "one_sum");
  forced.chunk_steps = int_of(chunk_steps, "chunk_steps");
  forced.depth = int_of(depth, "depth");
  forced.threads = int_of(threads, "threads");
  forced.by_rows = bool_of(by_rows, "by_rows");
  cpu::force(forced);
}

}  // namespace lstm_ext::ops
