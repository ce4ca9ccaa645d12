"""The trainable InternVL: module names are the checkpoint's tensor names, so its state is the checkpoint.

Computes what the services compute (tests/deploy/demo_training/test_model.py compares them), in whole
batches and with gradients; it knows nothing of caches, tiles in flight or requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from deploy.demo_training.sample import MARK_LABELS
from deploy.random_checkpoint import PATCH, CheckpointShape
from encoder_service.model.projector import pixel_shuffle

ROPE_THETA = 1_000_000.0
NO_MARK = 255  # of a patch, where nothing is to be told


class VisionAttention(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.num_heads = shape.vision_heads
        self.qkv = nn.Linear(shape.vision_hidden, 3 * shape.vision_hidden)
        self.proj = nn.Linear(shape.vision_hidden, shape.vision_hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind())  # [num_tiles, num_heads, length, head_dim]
        output: torch.Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return output


class VisionMLP(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.vision_hidden, shape.vision_intermediate)
        self.fc2 = nn.Linear(shape.vision_intermediate, shape.vision_hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.fc2(F.gelu(self.fc1(hidden)))
        return output


class VisionLayer(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.vision_hidden, eps=1e-6)
        self.attn = VisionAttention(shape)
        self.ls1 = nn.Parameter(torch.ones(shape.vision_hidden))
        self.norm2 = nn.LayerNorm(shape.vision_hidden, eps=1e-6)
        self.mlp = VisionMLP(shape)
        self.ls2 = nn.Parameter(torch.ones(shape.vision_hidden))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.ls1 * self.attn(self.norm1(hidden))
        output: torch.Tensor = hidden + self.ls2 * self.mlp(self.norm2(hidden))
        return output


class VisionEmbeddings(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        num_patches = (shape.image_size // PATCH) ** 2
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, shape.vision_hidden))
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + num_patches, shape.vision_hidden))
        self.patch_embedding = nn.Conv2d(3, shape.vision_hidden, PATCH, PATCH)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), -1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding


class VisionLayers(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(shape) for _ in range(shape.vision_layers))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class VisionModel(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(shape)
        self.encoder = VisionLayers(shape)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_tiles, 3, S, S] -> [num_tiles, num_patches, vision_hidden]"""
        hidden: torch.Tensor = self.encoder(self.embeddings(pixels))
        return hidden[:, 1:]


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = F.rms_norm(hidden, self.weight.shape, None, 1e-6)
        return normalised * self.weight


class SelfAttention(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        query_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden, bias=False)
        self.q_norm = RMSNorm(shape.head_dim)
        self.k_norm = RMSNorm(shape.head_dim)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        query = rotate(self.q_norm(self._heads(self.q_proj(hidden))), cos, sin)
        key = rotate(self.k_norm(self._heads(self.k_proj(hidden))), cos, sin)
        value = self._heads(self.v_proj(hidden))
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(-2))
        return output

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        """[batch, length, heads * head_dim] -> [batch, heads, length, head_dim]"""
        heads: torch.Tensor = projected.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class DecoderLayer(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden)
        self.self_attn = SelfAttention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden)
        self.mlp = MLP(shape)

    def forward(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        output: torch.Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden)
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, length, hidden] -> hidden states; sequences are padded at their ends only."""
        cos, sin = rotary_table(hidden.shape[1], self.head_dim, hidden)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        output: torch.Tensor = self.norm(hidden)
        return output


class LanguageModel(nn.Module):
    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab_size, bias=False)


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor  # [num_targets, vocab_size] where the caller asked for them
    mark_logits: torch.Tensor  # [num_tiles, num_patches, len(MARK_LABELS)]


class DemoModel(nn.Module):
    """`InternVLChatModel` with a head that names the mark of each patch, which only training uses.

    The head says of every glyph where it stands: without it the tower learns characters only through
    the decoder, which first has to find out where to look.
    """

    def __init__(self, shape: CheckpointShape) -> None:
        super().__init__()
        self.vision_model = VisionModel(shape)
        wide = 4 * shape.vision_hidden
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide),
            nn.Linear(wide, shape.hidden),
            nn.GELU(),
            nn.Linear(shape.hidden, shape.hidden),
        )
        self.language_model = LanguageModel(shape)
        self.mark_head = nn.Linear(shape.vision_hidden, len(MARK_LABELS))

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, visual: torch.Tensor, wanted: torch.Tensor
    ) -> Output:
        """
        Args:
            pixels: [num_tiles, 3, S, S], normalised; num_tiles may be 0.
            ids: [batch, length]
            visual: [num_tiles * tokens_per_tile] positions of the visual tokens in the flattened ids.
            wanted: positions in the flattened ids whose next-token logits are needed.
        """
        patches = self.vision_model(pixels)
        tokens = self.mlp1(pixel_shuffle(patches, 2, "v2"))
        embeds = self.language_model.model.embed_tokens(ids).to(tokens.dtype)
        flat = embeds.flatten(0, 1).index_copy(0, visual, tokens.flatten(0, 1))
        hidden = self.language_model.model(flat.view_as(embeds))
        logits = self.language_model.lm_head(hidden.flatten(0, 1)[wanted])
        return Output(logits, self.mark_head(patches))

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """What is saved: everything but the training-only head."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("mark_head.")}

    def compiled_parts(self) -> Iterator[nn.Module]:
        """Layers, each kind of which is compiled once."""
        yield from self.vision_model.encoder.layers
        yield from self.language_model.model.layers


def rotary_table(length: int, head_dim: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, [length, head_dim] each, computed in fp32 and rounded to the dtype of `like`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=like.device) / head_dim
    angles = torch.arange(length, device=like.device).float()[:, None] / ROPE_THETA**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE (Su et al. 2021) in the order of Llama's rotate_half; heads are [..., length, head_dim]."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def initialise(model: DemoModel, seed: int) -> None:
    """Matrices of gain 1 over their inputs; what ends a residual branch starts at zero, so depth is harmless.

    Embeddings start about as large as visual tokens: the first norm would blow up small ones' gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if _ends_branch(name) or name.endswith("bias"):
                parameter.zero_()
            elif "embed_tokens" in name:
                parameter.normal_(0, 0.5, generator=generator)
            elif name.endswith("_embedding"):
                parameter.normal_(0, 0.2, generator=generator)
            elif parameter.dim() > 1:
                gain = 0.2 if "lm_head" in name else 1.0
                parameter.normal_(0, gain * parameter[0].numel() ** -0.5, generator=generator)


def _ends_branch(name: str) -> bool:
    return name.endswith(("attn.proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight"))
