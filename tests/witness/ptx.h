// Interprets the PTX that the kernels' asm statements hold: the text itself, operands in the order it names them.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <type_traits>

#include "cuda_shim.h"

namespace witness {

class Ptx {
 public:
  explicit Ptx(const char* text) : text_(text) {}

  template <typename T>
  Ptx& output(const char* constraint, T& value) {
    static_assert(sizeof(T) == 4);
    operands_.push_back({constraint, &value, 0});
    return *this;
  }
  template <typename T>
  Ptx& input(const char* constraint, T value) {
    uint64_t bits = 0;
    if constexpr (std::is_pointer_v<T>)
      bits = reinterpret_cast<uint64_t>(value);
    else
      std::memcpy(&bits, &value, sizeof(value));
    operands_.push_back({constraint, nullptr, bits});
    return *this;
  }

  void run() {
    std::string text = text_;
    for (char& c : text)
      if (c == '\n' || c == '\t') c = ' ';
    std::stringstream statements(text);
    for (std::string one; std::getline(statements, one, ';');)
      if (one.find_first_not_of(' ') != std::string::npos) instruction(one);
  }

  // To nearest, ties away from zero; NaN stays NaN, whatever its bits.
  static uint32_t to_tf32(uint32_t word) {
    return std::isnan(__uint_as_float(word)) ? 0x7fffe000u : (word + 0x1000u) & 0xffffe000u;
  }
  // As .ftz does with a result below the normal range.
  static float normal_or_zero(float x) { return x < std::numeric_limits<float>::min() ? 0.0f : x; }

  static float half_to_float(uint32_t half) {
    const int exponent = int(half >> 10 & 31), mantissa = int(half & 1023);
    const float magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                            : exponent     ? std::ldexp(float(1024 + mantissa), exponent - 25)
                                           : std::ldexp(float(mantissa), -24);
    return half >> 15 ? -magnitude : magnitude;
  }

 private:
  struct Operand {
    std::string constraint;
    void* address;
    uint64_t value;
  };

  void instruction(const std::string& text) {
    const size_t start = text.find_first_not_of(' '), space = text.find(' ', start);
    const std::string name = text.substr(start, space == std::string::npos ? space : space - start);
    // The operands as the text names them, braces and brackets left out: %3, or a number.
    std::vector<uint64_t> value;
    std::vector<int> index;
    for (size_t at = space; at < text.size(); ++at) {
      const bool named = text[at] == '%';
      if (!named && !std::isdigit(text[at])) continue;
      char* end = nullptr;
      const unsigned long number = std::strtoul(text.c_str() + at + named, &end, 10);
      if (named && number >= operands_.size()) fail("asm names an operand that it does not have: " + text);
      index.push_back(named ? int(number) : -1);
      value.push_back(named ? read(operands_[number]) : number);
      at = size_t(end - text.c_str()) - 1;
    }
    if (name == "cp.async.cg.shared.global")
      copy(value);
    else if (name == "cp.async.commit_group")
      copies.push_back({nullptr, nullptr, 0, 0, true});
    else if (name == "cp.async.wait_group")
      wait_for_copies(int(value.at(0)));
    else if (name == "cp.async.wait_all")
      wait_for_copies(0);
    else if (name == "cvt.rna.tf32.f32")
      write(index.at(0), to_tf32(uint32_t(value.at(1))));
    else if (name == "ex2.approx.ftz.f32")
      write(index.at(0), __float_as_uint(normal_or_zero(std::exp2(__uint_as_float(uint32_t(value.at(1)))))));
    else if (name == "cvt.rn.bf16x2.f32")  // the first source is the upper half
      write(index.at(0), to_bfloat16(value.at(2)) | to_bfloat16(value.at(1)) << 16);
    else if (name == "cvt.rn.f16x2.f32")
      write(index.at(0), to_half(value.at(2)) | to_half(value.at(1)) << 16);
    else if (name.rfind("mma.sync.aligned.m16n8k16.row.col.f32.bf16", 0) == 0)
      multiply<16>(index, value, [](uint32_t half) { return __uint_as_float(half << 16); });
    else if (name.rfind("mma.sync.aligned.m16n8k16.row.col.f32.f16", 0) == 0)
      multiply<16>(index, value, half_to_float);
    else if (name.rfind("mma.sync.aligned.m16n8k8.row.col.f32.tf32", 0) == 0)
      multiply<8>(index, value, [](uint32_t word) { return __uint_as_float(word & 0xffffe000u); });
    else if (name.rfind("ldmatrix.sync.aligned.m8n8.", 0) == 0)
      load_matrices(name, index, value);
    else
      fail("no interpretation of " + name);
  }

  static uint64_t read(const Operand& o) {
    if (!o.address) return o.value;
    uint32_t word;
    std::memcpy(&word, o.address, sizeof(word));
    return word;
  }
  void write(int index, uint32_t word) { std::memcpy(operands_[size_t(index)].address, &word, sizeof(word)); }

  static void copy(const std::vector<uint64_t>& value) {
    const int bytes = int(value.at(2)), filled = value.size() > 3 ? int(value[3]) : bytes;
    if (bytes != 16 || filled < 0 || filled > 16) fail("cp.async.cg copies 16 bytes");
    if (value[0] % 16 || value[1] % 16) fail("cp.async.cg needs 16-byte alignment");
    if (value[0] + 16 > current_block()->dynamic_bytes) fail("cp.async beyond shared memory");
    const Copy c{dynamic_shared() + value[0], reinterpret_cast<const unsigned char*>(value[1]), bytes, filled, false};
    std::memset(c.to, kPending, 16);
    copies.push_back(c);
  }

  static uint32_t to_bfloat16(uint64_t word) {
    const uint32_t bits = uint32_t(word);
    if (std::isnan(__uint_as_float(bits))) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  }
  // To nearest, ties to even: a division by the spacing of the result, which nearbyint rounds.
  static uint32_t to_half(uint64_t word) {
    const float x = __uint_as_float(uint32_t(word)), magnitude = std::fabs(x);
    const uint32_t sign = std::signbit(x) ? 0x8000u : 0;
    if (std::isnan(x)) return 0x7fff;
    int exponent = 0;
    std::frexp(magnitude, &exponent);  // magnitude < 2^exponent
    const int spacing = std::max(exponent - 11, -24);
    const float units = std::nearbyint(std::ldexp(magnitude, -spacing));
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    return sign | uint32_t((spacing + 24) * 1024 + int(units));
  }

  // d (16 x 8) = a (16 x depth) b (depth x 8) + c. Lane 4 g + t holds, of each operand, rows (or columns) g and g + 8.
  template <int kDepth, typename Decode>
  void multiply(const std::vector<int>& index, const std::vector<uint64_t>& value, Decode decode) {
    if (index.size() != 14) fail("mma has 14 operands");
    constexpr int kPer = kDepth / 8;  // numbers in a register
    const int lane = int(threadIdx.x % kWarpSize);
    uint64_t mine[6], words[kWarpSize][6];
    for (int i = 0; i < 6; ++i) mine[i] = value[size_t(4 + i)];
    exchange_words(mine, words);
    const auto number = [&](int owner, int word, int part) {
      const uint32_t bits = uint32_t(words[owner][word]);
      return decode(kPer == 1 ? bits : bits >> (16 * part) & 0xffffu);
    };
    float result[4];
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + (i & 1);
      result[i] = __uint_as_float(uint32_t(value[size_t(10 + i)]));
      for (int k = 0; k < kDepth; ++k) {
        const int upper = k / (4 * kPer), t = k / kPer % 4, part = k % kPer;
        result[i] += number(row % 8 * 4 + t, 2 * upper + row / 8, part) * number(column * 4 + t, 4 + upper, part);
      }
    }
    for (int i = 0; i < 4; ++i) write(index[size_t(i)], __float_as_uint(result[i]));
  }

  // Matrix m of 8 x 8 16-bit numbers: lane 8 m + r gives the address of row r; lane l gets words of row l / 4.
  void load_matrices(const std::string& name, const std::vector<int>& index, const std::vector<uint64_t>& value) {
    const bool transposed = name.find(".trans") != std::string::npos;
    const size_t count = index.size() - 1;
    const int lane = int(threadIdx.x % kWarpSize);
    const uint64_t mine[1] = {value.back()};
    uint64_t words[kWarpSize][1];
    exchange_words(mine, words);
    uint32_t result[4] = {};
    for (size_t m = 0; m < count; ++m)
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * (lane % 4) + half : lane / 4;
        const int column = transposed ? lane / 4 : 2 * (lane % 4) + half;
        const size_t at = words[int(m) * 8 + row][0];
        if (at % 16 || at + 16 > current_block()->dynamic_bytes)
          fail("ldmatrix: a row that is no row of shared memory");
        uint16_t number;
        std::memcpy(&number, dynamic_shared() + at + 2 * column, sizeof(number));
        result[m] |= uint32_t(number) << (16 * half);
      }
    for (size_t m = 0; m < count; ++m) write(index[m], result[m]);
  }

  const char* text_;
  std::vector<Operand> operands_;
};

}  // namespace witness
