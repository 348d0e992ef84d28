// What the updates multiply and add, where a tensor on the GPU says it, so that the host never waits to read it. One
// thread a parameter.
#include <metal_stdlib>
#include "adamw/adamw_params.h"
using namespace metal;
using namespace torch_fused;

// A number of some 48 bits, as the sum of two.
struct Twofold {
  float high, low;
};

inline Twofold times(Twofold a, Twofold b) {
  const float product = a.high * b.high;
  const float rest = fma(a.high, b.high, -product) + (a.high * b.low + a.low * b.high);
  const float high = product + rest;
  const Twofold result = {high, rest - (high - product)};
  return result;
}

// 1 - base^n. A power in float32 would be 1e-5 off at the first steps, where it is close to 1.
inline float one_minus_power(Twofold base, float n) {
  Twofold power = {1.0f, 0.0f};
  for (uint left = uint(min(n, 4e9f)); left > 0; left /= 2) {
    if (left % 2 == 1) power = times(power, base);
    base = times(base, base);
  }
  return (1.0f - power.high) - power.low;
}

inline float number(bool in_buffer, device const float* buffer, float otherwise) {
  return in_buffer ? *buffer : otherwise;
}

#define STEP(i) device float* step##i [[buffer(i)]]
#define PICK_STEP(i) \
  if (thread_id == i) step = step##i;

[[kernel, max_total_threads_per_threadgroup(32)]]
void adamw_numbers(STEP(0), STEP(1), STEP(2), STEP(3), STEP(4), STEP(5), STEP(6), STEP(7), STEP(8), STEP(9), STEP(10),
                   STEP(11), STEP(12), STEP(13), STEP(14), STEP(15), STEP(16), STEP(17), STEP(18), STEP(19), STEP(20),
                   device const float* lr_buffer [[buffer(21)]], device const float* beta1_buffer [[buffer(22)]],
                   device const float* beta2_buffer [[buffer(23)]], device const float* grad_scale [[buffer(24)]],
                   device const float* found_inf [[buffer(25)]], device const float* grad_squares [[buffer(26)]],
                   device AdamwNumbers* numbers [[buffer(27)]], constant AdamwNumbersParams& p [[buffer(28)]],
                   uint thread_id [[thread_position_in_threadgroup]]) {
  if (thread_id >= p.tensors) return;
  const bool skip = (p.flags & HAS_FOUND_INF) != 0 && *found_inf != 0.0f;
  float count = p.steps[thread_id];
  if ((p.flags & STEPS_ON_DEVICE) != 0) {
    device float* step = step0;
    PICK_STEP(1) PICK_STEP(2) PICK_STEP(3) PICK_STEP(4) PICK_STEP(5) PICK_STEP(6) PICK_STEP(7) PICK_STEP(8)
    PICK_STEP(9) PICK_STEP(10) PICK_STEP(11) PICK_STEP(12) PICK_STEP(13) PICK_STEP(14) PICK_STEP(15) PICK_STEP(16)
    PICK_STEP(17) PICK_STEP(18) PICK_STEP(19) PICK_STEP(20)
    count = *step + 1.0f;
    if (!skip) *step = count;
  }
  const float lr = number((p.flags & HAS_LR) != 0, lr_buffer, p.lr);
  Twofold beta1 = {p.beta1, p.beta1_low}, beta2 = {p.beta2, p.beta2_low};
  float lerp = p.lerp, one_minus_beta2 = p.one_minus_beta2;
  if ((p.flags & HAS_BETA1) != 0) {
    beta1 = {*beta1_buffer, 0.0f};
    lerp = 1.0f - beta1.high;
  }
  if ((p.flags & HAS_BETA2) != 0) {
    beta2 = {*beta2_buffer, 0.0f};
    one_minus_beta2 = 1.0f - beta2.high;
  }
  const float inverse_scale = (p.flags & HAS_GRAD_SCALE) != 0 ? 1.0f / *grad_scale : 1.0f;
  float clip = 1.0f;
  if ((p.flags & CLIPS) != 0) {
    const float ratio = p.max_grad_norm / (sqrt(*grad_squares) * inverse_scale + 1e-6f);
    clip = ratio > 1.0f ? 1.0f : ratio;  // NaN stays
  }
  const AdamwNumbers made = {{sqrt(one_minus_power(beta2, count)), -lr / one_minus_power(beta1, count),
                              fma(-lr, p.weight_decay, 1.0f), p.sign * clip * inverse_scale, lerp, beta2.high,
                              one_minus_beta2, p.eps},
                             skip ? 1.0f : 0.0f};
  numbers[p.first_number + thread_id] = made;
}
