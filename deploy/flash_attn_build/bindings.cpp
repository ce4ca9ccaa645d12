// The package's forward functions as operators of PyTorch: nothing of Python is needed to build them, and one
// binary serves every Python.  flash_attn_2_cuda.py gives them the names that the package calls.
#include "flash_api.cpp"

#include <torch/library.h>

namespace FLASH_NAMESPACE {

// flash_api.cpp refers to it from functions that refuse before they call it.
template <typename T, int Headdim, bool Is_causal>
void run_mha_bwd_(Flash_bwd_params &, cudaStream_t) {
  TORCH_CHECK(false, "this build of flash-attn has no backward");
}

}  // namespace FLASH_NAMESPACE

namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using MaybeConst = std::optional<const Tensor>;
using MaybeGenerator = std::optional<at::Generator>;

Tensors fwd(Tensor q, const Tensor &k, const Tensor &v, MaybeTensor out, MaybeTensor alibi_slopes,
            double p_dropout, double softmax_scale, bool is_causal, int64_t window_left,
            int64_t window_right, double softcap, bool return_softmax, MaybeGenerator generator) {
  return FLASH_NAMESPACE::mha_fwd(q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal,
                                  window_left, window_right, softcap, return_softmax, generator);
}

Tensors varlen_fwd(Tensor q, const Tensor &k, const Tensor &v, MaybeTensor out, const Tensor &cu_seqlens_q,
                   const Tensor &cu_seqlens_k, MaybeTensor seqused_k, MaybeTensor leftpad_k,
                   MaybeTensor block_table, MaybeTensor alibi_slopes, int64_t max_seqlen_q,
                   int64_t max_seqlen_k, double p_dropout, double softmax_scale, bool zero_tensors,
                   bool is_causal, int64_t window_left, int64_t window_right, double softcap,
                   bool return_softmax, MaybeGenerator generator) {
  MaybeConst leftpad(leftpad_k);
  return FLASH_NAMESPACE::mha_varlen_fwd(q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad,
                                         block_table, alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout,
                                         softmax_scale, zero_tensors, is_causal, window_left, window_right,
                                         softcap, return_softmax, generator);
}

Tensors fwd_kvcache(Tensor q, const Tensor &k_cache, const Tensor &v_cache, MaybeTensor k, MaybeTensor v,
                    MaybeTensor seqlens_k, MaybeTensor rotary_cos, MaybeTensor rotary_sin,
                    MaybeTensor cache_batch_idx, MaybeTensor leftpad_k, MaybeTensor block_table,
                    MaybeTensor alibi_slopes, MaybeTensor out, double softmax_scale, bool is_causal,
                    int64_t window_left, int64_t window_right, double softcap, bool is_rotary_interleaved,
                    int64_t num_splits) {
  MaybeConst new_k(k), new_v(v), lens(seqlens_k), cos(rotary_cos), sin(rotary_sin), index(cache_batch_idx),
      leftpad(leftpad_k);
  return FLASH_NAMESPACE::mha_fwd_kvcache(q, k_cache, v_cache, new_k, new_v, lens, cos, sin, index, leftpad,
                                          block_table, alibi_slopes, out, softmax_scale, is_causal,
                                          window_left, window_right, softcap, is_rotary_interleaved,
                                          num_splits);
}

}  // namespace

TORCH_LIBRARY(flash_attn_2_forward, library) {
  library.def(
      "fwd(Tensor q, Tensor k, Tensor v, Tensor(a!)? out, Tensor? alibi_slopes, float p_dropout, "
      "float softmax_scale, bool is_causal, int window_left, int window_right, float softcap, "
      "bool return_softmax, Generator? generator) -> Tensor[]");
  library.def(
      "varlen_fwd(Tensor q, Tensor k, Tensor v, Tensor(a!)? out, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
      "Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, "
      "int max_seqlen_k, float p_dropout, float softmax_scale, bool zero_tensors, bool is_causal, "
      "int window_left, int window_right, float softcap, bool return_softmax, Generator? generator) "
      "-> Tensor[]");
  library.def(
      "fwd_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
      "Tensor? seqlens_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_batch_idx, "
      "Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, Tensor(c!)? out, float softmax_scale, "
      "bool is_causal, int window_left, int window_right, float softcap, bool is_rotary_interleaved, "
      "int num_splits) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(flash_attn_2_forward, CUDA, library) {
  library.impl("fwd", &fwd);
  library.impl("varlen_fwd", &varlen_fwd);
  library.impl("fwd_kvcache", &fwd_kvcache);
}
