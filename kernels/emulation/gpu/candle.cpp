// Twins of candle's own kernels, by their symbols: those that run under this crate's programs. The arguments are as
// candle-core's cuda_backend gives them.
#include "gpu.h"
#include "number.h"
#include <map>
#include <vector>

namespace {

using number::read, number::write;

const std::map<std::string, int> kTypes = {{"f32", number::kF32},   {"f64", number::kF64}, {"f16", number::kF16},
                                           {"bf16", number::kBf16}, {"u8", number::kU8},   {"u32", number::kU32},
                                           {"i64", number::kI64}};

// Dims and strides in device memory, or none where the tensor is contiguous.
struct View {
  size_t dims;
  const size_t* info;
  size_t which;  // of several strides

  size_t operator()(size_t i) const {
    if (!info) return i;
    size_t at = 0;
    for (size_t d = dims; d-- > 0;) {
      at += i % info[d] * info[(1 + which) * dims + d];
      i /= info[d];
    }
    return at;
  }
};

using Unary = long double (*)(long double);
const std::map<std::string, Unary> kUnary = {
    {"ucopy", [](long double x) { return x; }},     {"uneg", [](long double x) { return -x; }},
    {"uabs", [](long double x) { return fabsl(x); }}, {"usqr", [](long double x) { return x * x; }},
    {"usqrt", [](long double x) { return sqrtl(x); }}, {"uexp", [](long double x) { return expl(x); }},
    {"ulog", [](long double x) { return logl(x); }},   {"urecip", [](long double x) { return 1 / x; }},
    {"utanh", [](long double x) { return tanhl(x); }},
};

using Binary = long double (*)(long double, long double);
const std::map<std::string, Binary> kBinary = {
    {"badd", [](long double x, long double y) { return x + y; }},
    {"bsub", [](long double x, long double y) { return x - y; }},
    {"bmul", [](long double x, long double y) { return x * y; }},
    {"bdiv", [](long double x, long double y) { return x / y; }},
    {"bmaximum", [](long double x, long double y) { return x > y ? x : y; }},
    {"bminimum", [](long double x, long double y) { return x < y ? x : y; }},
};
// To u8.
const std::map<std::string, Binary> kComparison = {
    {"eq", [](long double x, long double y) { return static_cast<long double>(x == y); }},
    {"ne", [](long double x, long double y) { return static_cast<long double>(x != y); }},
    {"lt", [](long double x, long double y) { return static_cast<long double>(x < y); }},
    {"le", [](long double x, long double y) { return static_cast<long double>(x <= y); }},
    {"gt", [](long double x, long double y) { return static_cast<long double>(x > y); }},
    {"ge", [](long double x, long double y) { return static_cast<long double>(x >= y); }},
};

template <class T> const T* find(const std::map<std::string, T>& map, const std::string& key) {
  auto found = map.find(key);
  return found == map.end() ? nullptr : &found->second;
}

// An index of nothing, as candle has it: the largest of its type.
bool is_nothing(size_t id, int type) {
  return id == (type == number::kU8 ? UINT8_MAX : type == number::kU32 ? UINT32_MAX : static_cast<size_t>(INT64_MAX));
}

}  // namespace

std::function<void()> gpu::kernel_of_candle(const Launch& launch) {
  const size_t end = launch.symbol.rfind('_');
  if (end == std::string::npos) return {};
  const std::string name = launch.symbol.substr(0, end);
  const int* const found = find(kTypes, launch.symbol.substr(end + 1));
  if (!found) return {};
  const int type = *found;
  auto size = [&](int i) { return launch.argument<size_t>(i); };
  auto input = [&](int i) { return launch.argument<const void*>(i); };
  auto output = [&](int i) { return launch.argument<void*>(i); };
  // Most begin with their count, and how many dims, which and which strides there are.
  auto view = [&](size_t which) { return View{size(1), launch.argument<const size_t*>(2), which}; };

  if (name == "fill") {
    void* out = output(0);
    const long double value = read(launch.arguments[1], 0, type);
    const size_t count = size(2);
    return [=] { for (size_t i = 0; i < count; i++) write(out, i, type, value); };
  }
  if (name == "copy2d") {
    const void* in = input(0);
    void* out = output(1);
    const uint32_t rows = launch.argument<uint32_t>(2), columns = launch.argument<uint32_t>(3);
    const uint32_t from = launch.argument<uint32_t>(4), to = launch.argument<uint32_t>(5);
    return [=] {
      for (size_t i = 0; i < rows; i++) {
        for (size_t j = 0; j < columns; j++) write(out, i * to + j, type, read(in, i * from + j, type));
      }
    };
  }
  if (name.rfind("ia_", 0) == 0) {
    const int* const index = find(kTypes, name.substr(3));
    if (!index) return {};
    const int of_ids = *index;
    const void *ids = input(0), *in = input(2);
    void* out = output(3);
    const size_t added = size(1), left = size(4), to = size(6), right = size(7);
    return [=] {
      for (size_t i = 0; i < left * added * right; i++) {
        const size_t id = static_cast<size_t>(read(ids, i / right % added, of_ids));
        if (is_nothing(id, of_ids)) continue;
        if (id >= to) gpu::fail("index_add to %zu among %zu", id, to);
        const size_t at = (i / (right * added) * to + id) * right + i % right;
        write(out, at, type, read(out, at, type) + read(in, i, type));
      }
    };
  }
  const size_t count = size(0);
  if (name == "const_set") {
    const long double value = read(launch.arguments[3], 0, type);
    void* out = output(4);
    const View at = view(0);
    return [=] { for (size_t i = 0; i < count; i++) write(out, at(i), type, value); };
  }
  if (name == "affine") {
    const void* in = input(3);
    void* out = output(4);
    const long double factor = read(launch.arguments[5], 0, type), term = read(launch.arguments[6], 0, type);
    const View at = view(0);
    return [=] {
      for (size_t i = 0; i < count; i++) {
        const long double x = in ? read(in, at(i), type) : read(out, i, type);
        write(out, i, type, x * factor + term);
      }
    };
  }
  if (name.rfind("cast_", 0) == 0) {
    const int* const source = find(kTypes, name.substr(5));
    if (!source) return {};
    const int from = *source;
    const void* in = input(3);
    void* out = output(4);
    const View at = view(0);
    return [=] { for (size_t i = 0; i < count; i++) write(out, i, type, read(in, at(i), from)); };
  }
  if (const Unary* const function = find(kUnary, name)) {
    const Unary f = *function;
    const void* in = input(3);
    void* out = output(4);
    const View at = view(0);
    return [=] { for (size_t i = 0; i < count; i++) write(out, i, type, f(in ? read(in, at(i), type) : read(out, i, type))); };
  }
  const Binary* arithmetic = find(kBinary, name);
  const Binary* comparison = find(kComparison, name);
  if (arithmetic || comparison) {
    const Binary f = arithmetic ? *arithmetic : *comparison;
    const int result = arithmetic ? type : static_cast<int>(number::kU8);
    const void *left = input(3), *right = input(4);
    void* out = output(5);
    const View of_left = view(0), of_right = view(1);
    return [=] {
      for (size_t i = 0; i < count; i++) write(out, i, result, f(read(left, of_left(i), type), read(right, of_right(i), type)));
    };
  }
  if (name.rfind("is_", 0) == 0) {
    const int* const index = find(kTypes, name.substr(3));
    if (!index) return {};
    const int of_ids = *index;
    const void *ids = input(3), *in = input(4);
    void* out = output(5);
    const size_t from = size(7), chosen = size(8), right = size(9);
    return [=] {  // of contiguous tensors, which candle makes them
      for (size_t i = 0; i < count; i++) {
        const size_t id = static_cast<size_t>(read(ids, i / right % chosen, of_ids));
        if (is_nothing(id, of_ids)) {
          write(out, i, type, 0);
          continue;
        }
        if (id >= from) gpu::fail("index_select of %zu among %zu", id, from);
        write(out, i, type, read(in, (i / (right * chosen) * from + id) * right + i % right, type));
      }
    };
  }
  const bool small = name == "fast_sum_small";
  if (small || name == "fast_sum" || name == "fast_max" || name == "fast_min") {
    const size_t width = size(1), rows = small ? count : launch.shape.grid;
    const View at{size(2), launch.argument<const size_t*>(3), 0};
    const void* in = input(4);
    void* out = output(5);
    const bool sum = small || name == "fast_sum", most = name == "fast_max";
    return [=] {
      for (size_t row = 0; row < rows; row++) {
        long double result = sum ? 0 : read(in, at(row * width), type);
        for (size_t i = 0; i < width; i++) {
          const long double x = read(in, at(row * width + i), type);
          result = sum ? result + x : (most ? x > result : x < result) ? x : result;
        }
        write(out, row, type, result);
      }
    };
  }
  return {};
}
