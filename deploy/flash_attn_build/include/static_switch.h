// The package's choice of kernels by type and head size, narrowed to those that build.py compiles.
#pragma once
#include_next <static_switch.h>

#undef FP16_SWITCH
#undef HEADDIM_SWITCH

#define FP16_SWITCH(is_fp16, ...)                                                          \
  [&] {                                                                                    \
    TORCH_CHECK(!(is_fp16), "this build of flash-attn has kernels for bfloat16 only");     \
    using elem_type = cutlass::bfloat16_t;                                                 \
    return __VA_ARGS__();                                                                  \
  }()

#define HEADDIM_SWITCH(head_size, ...)                                                     \
  [&] {                                                                                    \
    TORCH_CHECK((head_size) == 64 || (head_size) == 128,                                   \
                "this build of flash-attn has kernels for head sizes 64 and 128, not ",    \
                head_size);                                                                \
    if ((head_size) == 64) {                                                               \
      constexpr static int kHeadDim = 64;                                                  \
      return __VA_ARGS__();                                                                \
    }                                                                                      \
    constexpr static int kHeadDim = 128;                                                   \
    return __VA_ARGS__();                                                                  \
  }()
