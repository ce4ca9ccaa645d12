"""What crosses the unix socket between front ends and the engine, and between the engine and its ranks.

Frames are a 4-byte little-endian length and msgpack of one of these structs.  Both ends run the same build,
so the schema may change freely.
"""

from __future__ import annotations

import msgspec

from llm_service.sampling_params import SamplingParams


class PromptTile(msgspec.Struct, frozen=True, array_like=True):
    """Prompt positions [offset, offset + num_tokens) are the visual tokens that `key` names."""

    key: bytes
    offset: int
    num_tokens: int


class AddRequest(msgspec.Struct, frozen=True, tag=True):
    request_id: int  # unique per connection
    prompt_token_ids: list[int]
    tiles: list[PromptTile]
    params: SamplingParams
    stop_token_ids: list[int]
    max_tokens: int
    priority: int
    cache_salt: bytes
    takes_turns: bool = False  # with the encoders: tiles and prefill take turns
    arrival_tokens: int = 0  # visual tokens that come together; 0: nobody knows
    grammar: str = ""  # that every choice's text has to fulfil; empty: none


class TileStored(msgspec.Struct, frozen=True, tag=True):
    """A granted slot has been written; the writer will not touch it again."""

    request_id: int
    tile_index: int


class AbortRequest(msgspec.Struct, frozen=True, tag=True):
    """No slot of this request will be written after this message.  Ends it if need be; sent for each one."""

    request_id: int


class AbortChoice(msgspec.Struct, frozen=True, tag=True):
    """One choice has met its stop string; the request's other choices go on."""

    request_id: int
    index: int


class EngineReady(msgspec.Struct, frozen=True, tag=True):
    """First message of a connection; the visual store's file descriptor comes with its first byte."""

    max_model_len: int
    vocab_size: int
    hidden_size: int
    dtype: str  # element type of the visual store, torch's spelling ("bfloat16")
    num_slots: int
    slot_tokens: int  # most visual tokens of a slot
    num_blocks: int
    block_size: int
    language_digest: bytes  # of the checkpoint it serves, see protos.fingerprint
    gpu_uuid: str = ""  # of the (first) GPU; empty on a CPU


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []  # best first


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    request_id: int
    index: int  # choice
    tokens: list[TokenOutput]
    finish_reason: str | None  # "stop" or "length" with the last tokens
    num_cached_tokens: int
    scheduled_ns: int  # CLOCK_MONOTONIC of the first step, nanoseconds
    overlap_ns: int  # spent on the prompt while visual tokens of it were missing


class SlotGrant(msgspec.Struct, frozen=True, array_like=True):
    """The front end may write tile `tile_index` of the request into the slot, once."""

    request_id: int
    tile_index: int
    slot: int


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_preemptions: int
    num_store_hits: int = 0  # see VisualStore, since the engine started
    num_store_grants: int = 0
    num_store_slots_in_use: int = 0


class StepOutput(msgspec.Struct, frozen=True, tag=True):
    """One message a step and front end, for all of its requests."""

    outputs: list[SequenceOutput]
    grants: list[SlotGrant]
    stats: EngineStats


class RequestAccepted(msgspec.Struct, frozen=True, tag=True):
    request_id: int


class RequestRefused(msgspec.Struct, frozen=True, tag=True):
    """The request was not admitted, its step failed, or its grammar took too much (reason "model_error").

    Other reasons: "overloaded", "context_length_exceeded", "invalid_request".
    """

    request_id: int
    reason: str
    message: str


class VisualRows(msgspec.Struct, frozen=True, array_like=True):
    """Rows [first_row, first_row + num_rows) of a slot are the embeddings from `position` of the batch on."""

    position: int
    slot: int
    first_row: int
    num_rows: int


class StepInput(msgspec.Struct, frozen=True, tag=True):
    """All that a rank needs for one forward.  Batch order is that of `query_lens`."""

    token_ids: list[
        int
    ]  # of all new tokens, sequence by sequence; -1 - r: what row r of the step before sampled
    query_lens: list[int]
    context_lens: list[int]  # tokens in the cache after this step
    block_tables: list[list[int]]
    visual_rows: list[VisualRows]
    logits_positions: list[int]  # rows of the batch whose logits are wanted


ToEngine = AddRequest | TileStored | AbortRequest | AbortChoice
FromEngine = EngineReady | StepOutput | RequestAccepted | RequestRefused
