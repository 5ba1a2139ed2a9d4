// Cross-entropy. The forward walks a row twice: for its maximum, then, from the cache, for the sum
// of exponentials about it. The backward walks it once.
#pragma once

#include "cross_entropy.h"

#include "row_math.h"

namespace fusedformer {
namespace {

enum class Target { good, ignored, bad };

Target target_of(const CrossEntropy& a, int64_t row, int64_t& target) {
  target = a.target ? a.target[row] : a.target32[row];
  if (target == a.ignore_index) return Target::ignored;
  return target < 0 || target >= a.classes ? Target::bad : Target::good;
}

template <class T>
float element(const T* p) {
  return sum(load(p, Part{1}));
}

template <class T>
void forward(const CrossEntropy& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
    Floats highest[2] = {splat(-INFINITY), splat(-INFINITY)};
    for_columns<2>(a.classes, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
      highest[u] = max(highest[u], inside(load(x + column, n), n, -INFINITY));
    });
    const float top = largest(max(highest[0], highest[1]));
    const Floats centre = splat(top);
    Sums<2> sums, distances;
    for_columns<2>(a.classes, [&](int64_t column, int u, auto n) __attribute__((always_inline)) {
      const Floats below = load(x + column, n) - centre;
      sums.v[u] = sums.v[u] + inside(exp(below), n);
      if (a.uniform > 0.0f) {
        const Floats weight = a.weight ? load(a.weight + column, n) : splat(1.0f);
        distances.v[u] = distances.v[u] + inside(weight * below, n);
      }
    });
    // A logit's surprise, LSE - x, is exact even where both are large.
    const float log_sum = logf(sums.total());
    a.lse[row] = top + log_sum;
    int64_t target;
    const Target kind = target_of(a, row, target);
    if (kind != Target::good) {
      a.losses[row] = kind == Target::bad ? NAN : 0.0f;
      a.row_weights[row] = 0.0f;
      continue;
    }
    const float weight = a.weight ? a.weight[target] : 1.0f;
    float loss = a.share * weight * ((top - element(x + target)) + log_sum);
    if (a.uniform > 0.0f) loss += a.uniform * (a.weight_sum * log_sum - distances.total());
    a.losses[row] = loss;
    a.row_weights[row] = weight;
  }
}

template <class T>
void backward(const CrossEntropy& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.logits.data) + row * a.logits.stride;
    T* grad = static_cast<T*>(a.grad.data) + row * a.grad.stride;
    int64_t target;
    const Target kind = target_of(a, row, target);
    if (kind != Target::good) {
      const Floats all = splat(kind == Target::bad ? NAN : 0.0f);
      for_columns<2>(a.classes, [&](int64_t column, int, auto n) __attribute__((always_inline)) {
        store(grad + column, all, n);
      });
      continue;
    }
    const float upstream = a.grad_losses[row];
    const float hit = a.share * (a.weight ? a.weight[target] : 1.0f);
    const Floats slope = splat(hit + a.uniform * a.weight_sum), lse = splat(a.lse[row]);
    const Floats factor = splat(upstream), uniform = splat(a.uniform);
    const auto gradient = [&](int64_t column, auto n) __attribute__((always_inline)) {
      const Floats rest = a.weight ? uniform * load(a.weight + column, n) : uniform;
      return slope * exp(load(x + column, n) - lse) - rest;
    };
    // Before the loop, which may write over the logits.
    const Floats at_target = gradient(target, Part{1}) - splat(hit);
    for_columns<2>(a.classes, [&](int64_t column, int, auto n) __attribute__((always_inline)) {
      store(grad + column, gradient(column, n) * factor, n);
    });
    store(grad + target, at_target * factor, Part{1});
  }
}

void forward_rows(const CrossEntropy& a, int64_t first, int64_t last) {
  by_dtype(
      a.logits.type, FUSEDFORMER_OTHERS(cross_entropy_kernels),
      [&](auto element) { forward<decltype(element)>(a, first, last); },
      [&](const auto& others) { others.forward(a, first, last); });
}

void backward_rows(const CrossEntropy& a, int64_t first, int64_t last) {
  by_dtype(
      a.logits.type, FUSEDFORMER_OTHERS(cross_entropy_kernels),
      [&](auto element) { backward<decltype(element)>(a, first, last); },
      [&](const auto& others) { others.backward(a, first, last); });
}

}  // namespace

extern const CrossEntropyKernels FUSEDFORMER_NAME(cross_entropy_kernels) = {forward_rows,
                                                                            backward_rows};

}  // namespace fusedformer
