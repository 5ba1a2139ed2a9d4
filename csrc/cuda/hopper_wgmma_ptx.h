// wgmma in PTX. Each size is an instruction of its own, with its registers spelt out: the macros
// below spell them.
#pragma once

#include "hopper.h"

namespace fusedformer {
namespace hopper {

// Tells the compiler that these registers are read and written here. It moves no use of them past
// this, as it otherwise may: it does not know that wgmma writes them later.
__device__ __forceinline__ void touch(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void touch(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename Register, int kCount>
__device__ __forceinline__ void touch(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) touch(registers[i]);
}

template <typename... Registers>
__device__ __forceinline__ void wgmma_fence(Registers&... registers) {
  (touch(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending, typename... Registers>
__device__ __forceinline__ void wgmma_wait(Registers&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  (touch(registers), ...);
}

template <int N>
struct Wgmma;

// Eight registers, one block of 16 columns: as operands of the asm, and in its text.
#define FUSEDFORMER_ACC(i)                                                               \
  "+f"(acc[8 * i]), "+f"(acc[8 * i + 1]), "+f"(acc[8 * i + 2]), "+f"(acc[8 * i + 3]),    \
      "+f"(acc[8 * i + 4]), "+f"(acc[8 * i + 5]), "+f"(acc[8 * i + 6]), "+f"(acc[8 * i + 7])
#define FUSEDFORMER_ACC_1 FUSEDFORMER_ACC(0)
#define FUSEDFORMER_ACC_2 FUSEDFORMER_ACC_1, FUSEDFORMER_ACC(1)
#define FUSEDFORMER_ACC_3 FUSEDFORMER_ACC_2, FUSEDFORMER_ACC(2)
#define FUSEDFORMER_ACC_4 FUSEDFORMER_ACC_3, FUSEDFORMER_ACC(3)
#define FUSEDFORMER_ACC_5 FUSEDFORMER_ACC_4, FUSEDFORMER_ACC(4)
#define FUSEDFORMER_ACC_6 FUSEDFORMER_ACC_5, FUSEDFORMER_ACC(5)
#define FUSEDFORMER_ACC_7 FUSEDFORMER_ACC_6, FUSEDFORMER_ACC(6)
#define FUSEDFORMER_ACC_8 FUSEDFORMER_ACC_7, FUSEDFORMER_ACC(7)
#define FUSEDFORMER_ACC_9 FUSEDFORMER_ACC_8, FUSEDFORMER_ACC(8)
#define FUSEDFORMER_ACC_10 FUSEDFORMER_ACC_9, FUSEDFORMER_ACC(9)
#define FUSEDFORMER_ACC_11 FUSEDFORMER_ACC_10, FUSEDFORMER_ACC(10)
#define FUSEDFORMER_ACC_12 FUSEDFORMER_ACC_11, FUSEDFORMER_ACC(11)
#define FUSEDFORMER_ACC_13 FUSEDFORMER_ACC_12, FUSEDFORMER_ACC(12)
#define FUSEDFORMER_ACC_14 FUSEDFORMER_ACC_13, FUSEDFORMER_ACC(13)
#define FUSEDFORMER_ACC_15 FUSEDFORMER_ACC_14, FUSEDFORMER_ACC(14)
#define FUSEDFORMER_ACC_16 FUSEDFORMER_ACC_15, FUSEDFORMER_ACC(15)

#define FUSEDFORMER_TEXT_1 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FUSEDFORMER_TEXT_2 FUSEDFORMER_TEXT_1 ", " "%8, %9, %10, %11, %12, %13, %14, %15"
#define FUSEDFORMER_TEXT_3 FUSEDFORMER_TEXT_2 ", " "%16, %17, %18, %19, %20, %21, %22, %23"
#define FUSEDFORMER_TEXT_4 FUSEDFORMER_TEXT_3 ", " "%24, %25, %26, %27, %28, %29, %30, %31"
#define FUSEDFORMER_TEXT_5 FUSEDFORMER_TEXT_4 ", " "%32, %33, %34, %35, %36, %37, %38, %39"
#define FUSEDFORMER_TEXT_6 FUSEDFORMER_TEXT_5 ", " "%40, %41, %42, %43, %44, %45, %46, %47"
#define FUSEDFORMER_TEXT_7 FUSEDFORMER_TEXT_6 ", " "%48, %49, %50, %51, %52, %53, %54, %55"
#define FUSEDFORMER_TEXT_8 FUSEDFORMER_TEXT_7 ", " "%56, %57, %58, %59, %60, %61, %62, %63"
#define FUSEDFORMER_TEXT_9 FUSEDFORMER_TEXT_8 ", " "%64, %65, %66, %67, %68, %69, %70, %71"
#define FUSEDFORMER_TEXT_10 FUSEDFORMER_TEXT_9 ", " "%72, %73, %74, %75, %76, %77, %78, %79"
#define FUSEDFORMER_TEXT_11 FUSEDFORMER_TEXT_10 ", " "%80, %81, %82, %83, %84, %85, %86, %87"
#define FUSEDFORMER_TEXT_12 FUSEDFORMER_TEXT_11 ", " "%88, %89, %90, %91, %92, %93, %94, %95"
#define FUSEDFORMER_TEXT_13 FUSEDFORMER_TEXT_12 ", " "%96, %97, %98, %99, %100, %101, %102, %103"
#define FUSEDFORMER_TEXT_14 \
  FUSEDFORMER_TEXT_13 ", " "%104, %105, %106, %107, %108, %109, %110, %111"
#define FUSEDFORMER_TEXT_15 \
  FUSEDFORMER_TEXT_14 ", " "%112, %113, %114, %115, %116, %117, %118, %119"
#define FUSEDFORMER_TEXT_16 \
  FUSEDFORMER_TEXT_15 ", " "%120, %121, %122, %123, %124, %125, %126, %127"

// The number of the first operand after the accumulators' is N / 2; o0 to o6 count on from there.
#define FUSEDFORMER_SS(type, blocks, N, o0, o1, o2, o3, o4)                                    \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred accumulate;\n"                                                               \
      "setp.ne.b32 accumulate, %" #o2 ", 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                          \
      " {" FUSEDFORMER_TEXT_##blocks "}, %" #o0 ", %" #o1 ", accumulate, 1, 1, %" #o3 ", %" #o4 \
      ";\n"                                                                                    \
      "}\n"                                                                                    \
      : FUSEDFORMER_ACC_##blocks                                                               \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeA)), \
        "n"(static_cast<int>(kTransposeB)))

#define FUSEDFORMER_RS(type, blocks, N, o0, o1, o2, o3, o4, o5, o6)                            \
  asm volatile(                                                                                \
      "{\n"                                                                                    \
      ".reg .pred accumulate;\n"                                                               \
      "setp.ne.b32 accumulate, %" #o5 ", 0;\n"                                                 \
      "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                          \
      " {" FUSEDFORMER_TEXT_##blocks "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4      \
      ", accumulate, 1, 1, %" #o6 ";\n"                                                        \
      "}\n"                                                                                    \
      : FUSEDFORMER_ACC_##blocks                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                                    \
        "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kTransposeB)))

#define FUSEDFORMER_WGMMA(blocks, N, o0, o1, o2, o3, o4, o5, o6)                                  \
  template <>                                                                                     \
  struct Wgmma<N> {                                                                               \
    template <typename Element, bool kTransposeA, bool kTransposeB>                               \
    __device__ static __forceinline__ void ss(float (&acc)[N / 2], uint64_t a, uint64_t b,        \
                                              bool accumulate) {                                  \
      if constexpr (is_bfloat16<Element>())                                                       \
        FUSEDFORMER_SS("bf16", blocks, N, o0, o1, o2, o3, o4);                                    \
      else                                                                                        \
        FUSEDFORMER_SS("f16", blocks, N, o0, o1, o2, o3, o4);                                     \
    }                                                                                             \
    template <typename Element, bool kTransposeB>                                                 \
    __device__ static __forceinline__ void rs(float (&acc)[N / 2], const uint32_t (&a)[4],        \
                                              uint64_t b, bool accumulate) {                      \
      if constexpr (is_bfloat16<Element>())                                                       \
        FUSEDFORMER_RS("bf16", blocks, N, o0, o1, o2, o3, o4, o5, o6);                            \
      else                                                                                        \
        FUSEDFORMER_RS("f16", blocks, N, o0, o1, o2, o3, o4, o5, o6);                             \
    }                                                                                             \
  };

FUSEDFORMER_WGMMA(1, 16, 8, 9, 10, 11, 12, 13, 14)
FUSEDFORMER_WGMMA(2, 32, 16, 17, 18, 19, 20, 21, 22)
FUSEDFORMER_WGMMA(3, 48, 24, 25, 26, 27, 28, 29, 30)
FUSEDFORMER_WGMMA(4, 64, 32, 33, 34, 35, 36, 37, 38)
FUSEDFORMER_WGMMA(5, 80, 40, 41, 42, 43, 44, 45, 46)
FUSEDFORMER_WGMMA(6, 96, 48, 49, 50, 51, 52, 53, 54)
FUSEDFORMER_WGMMA(7, 112, 56, 57, 58, 59, 60, 61, 62)
FUSEDFORMER_WGMMA(8, 128, 64, 65, 66, 67, 68, 69, 70)
FUSEDFORMER_WGMMA(9, 144, 72, 73, 74, 75, 76, 77, 78)
FUSEDFORMER_WGMMA(10, 160, 80, 81, 82, 83, 84, 85, 86)
FUSEDFORMER_WGMMA(11, 176, 88, 89, 90, 91, 92, 93, 94)
FUSEDFORMER_WGMMA(12, 192, 96, 97, 98, 99, 100, 101, 102)
FUSEDFORMER_WGMMA(13, 208, 104, 105, 106, 107, 108, 109, 110)
FUSEDFORMER_WGMMA(14, 224, 112, 113, 114, 115, 116, 117, 118)
FUSEDFORMER_WGMMA(15, 240, 120, 121, 122, 123, 124, 125, 126)
FUSEDFORMER_WGMMA(16, 256, 128, 129, 130, 131, 132, 133, 134)

#undef FUSEDFORMER_WGMMA
#undef FUSEDFORMER_RS
#undef FUSEDFORMER_SS

template <int N, typename Element, bool kTransposeA, bool kTransposeB>
__device__ __forceinline__ void wgmma_ss(float (&acc)[N / 2], uint64_t descriptor_a,
                                         uint64_t descriptor_b, bool accumulate) {
  Wgmma<N>::template ss<Element, kTransposeA, kTransposeB>(acc, descriptor_a, descriptor_b,
                                                           accumulate);
}

template <int N, typename Element, bool kTransposeB>
__device__ __forceinline__ void wgmma_rs(float (&acc)[N / 2], const uint32_t (&a)[4],
                                         uint64_t descriptor_b, bool accumulate) {
  Wgmma<N>::template rs<Element, kTransposeB>(acc, a, descriptor_b, accumulate);
}

}  // namespace hopper
}  // namespace fusedformer
