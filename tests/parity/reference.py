"""What transformers says: prompt ids, tile pixels, visual embeddings and greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoVideoProcessor,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedTokenizerFast,
)

from tests.parity.scenarios import Picture, Scenario, Turn

MAX_TILES = 12
# Tokens of two runs are only comparable where the likeliest token wins by more than fp32 noise (about 1e-5
# here). A checkpoint whose greedy path has a closer call gets another seed in conftest.CHECKPOINTS.
MIN_TOP2_GAP = 5e-4

# internlm2-chat is Hermes-2 to the letter; internvl2_5 has a newline behind every turn and another name.
_INTERNVL2_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
    "英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL2_5_SYSTEM = (
    "你是书生·万象，英文名是InternVL，"
    "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
ORIGINAL_TEMPLATES = {
    "qwen2": (_INTERNVL2_5_SYSTEM, "<|im_end|>\n"),
    "qwen3": (_INTERNVL2_5_SYSTEM, "<|im_end|>\n"),
    "llama": (_INTERNVL2_SYSTEM, "<|im_end|>"),
    "internlm2": (_INTERNVL2_SYSTEM, "<|im_end|>"),
}


@dataclass(frozen=True)
class ReferenceInput:
    token_ids: list[int]
    pixel_values: torch.Tensor | None  # [num_tiles, 3, S, S] of all pictures
    num_tiles: list[int]  # of each picture, thumbnail included


@dataclass(frozen=True)
class GreedyAnswer:
    token_ids: list[int]
    min_top2_gap: float  # smallest distance between the two highest logits along the way


class Reference:
    """One family in one format. `hf_folder` holds the same weights in the -HF format."""

    def __init__(self, family: str, format: str, folder: Path, hf_folder: Path) -> None:
        self._template = ORIGINAL_TEMPLATES[family] if format == "chat" else None
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(hf_folder)
        self.model = InternVLForConditionalGeneration.from_pretrained(hf_folder, dtype=torch.float32).eval()
        # Random weights must not stop: ignore_eos.
        self.model.generation_config.eos_token_id = None
        self._processor = InternVLProcessor(
            # The Pillow backend: the default one resizes with torchvision's bicubic, which rounds the last
            # bits differently; the original code, and so the weights in training, saw Pillow's pixels.
            image_processor=AutoImageProcessor.from_pretrained(hf_folder, backend="pil"),
            tokenizer=tokenizer,
            video_processor=AutoVideoProcessor.from_pretrained(hf_folder),
            image_seq_length=self.model.config.image_seq_length,
            chat_template=tokenizer.chat_template,
        )
        self._answers: dict[tuple[Scenario, int], GreedyAnswer] = {}

    def input(self, scenario: Scenario) -> ReferenceInput:
        """Ids and pixels of the -HF processor; ids of the original's template in its format."""
        processed = self._process(scenario)
        if self._template is None:
            return processed
        prompt = self._original_prompt(scenario, processed.num_tiles)
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return ReferenceInput(ids, processed.pixel_values, processed.num_tiles)

    @torch.inference_mode()
    def visual_embeds(self, scenario: Scenario) -> torch.Tensor:
        """[num_tiles, tokens_per_tile, hidden_size] of all pictures"""
        pixels = self.input(scenario).pixel_values
        embeds: torch.Tensor = self.model.model.get_image_features(pixels).pooler_output
        return embeds

    def answer(self, scenario: Scenario, num_tokens: int) -> GreedyAnswer:
        key = scenario, num_tokens
        if key not in self._answers:
            self._answers[key] = self._generate(self.input(scenario), num_tokens)
        return self._answers[key]

    def tokens(self, scenario: Scenario, num_tokens: int) -> list[int]:
        """Greedy tokens, all of them won by a margin that rounding cannot turn over."""
        answer = self.answer(scenario, num_tokens)
        assert answer.min_top2_gap > MIN_TOP2_GAP, (
            f"{scenario.name}: a near-tie of {answer.min_top2_gap:.1e}; give the checkpoint another seed"
        )
        return answer.token_ids

    @torch.inference_mode()
    def _generate(self, given: ReferenceInput, num_tokens: int) -> GreedyAnswer:
        ids = torch.tensor([given.token_ids])
        pixels = {} if given.pixel_values is None else {"pixel_values": given.pixel_values}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **pixels,
            do_sample=False,
            max_new_tokens=num_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(output.logits)[:, 0].topk(2).values  # [num_tokens, 2]
        tokens = output.sequences[0, len(given.token_ids) :].tolist()
        assert len(tokens) == num_tokens
        return GreedyAnswer(tokens, float((best[:, 0] - best[:, 1]).min()))

    def _process(self, scenario: Scenario) -> ReferenceInput:
        text = self._processor.apply_chat_template(
            scenario.conversation(), tokenize=False, add_generation_prompt=True
        )
        pictures = scenario.pictures
        images = [picture.image for picture in pictures]
        bounds = {picture.max_tiles or MAX_TILES for picture in pictures} or {MAX_TILES}
        assert len(bounds) == 1, "the processor has one bound for all pictures of a prompt"
        options = {"max_patches": bounds.pop(), "crop_to_patches": True}
        inputs = self._processor(images=images or None, text=text, return_tensors="pt", images_kwargs=options)
        image_processor = self._processor.image_processor
        num_tiles = [
            image_processor.get_number_of_image_patches(image.height, image.width, options)
            for image in images
        ]
        return ReferenceInput(inputs["input_ids"][0].tolist(), inputs.get("pixel_values"), num_tiles)

    def _original_prompt(self, scenario: Scenario, num_tiles: list[int]) -> str:
        """InternVL's chat(): the whole text with `<image>` markers, which are then filled in in order."""
        assert self._template is not None
        system, separator = self._template
        text = f"<|im_start|>system\n{system}{separator}"
        for turn in scenario.turns:
            text += f"<|im_start|>{turn.role}\n{_original_content(turn)}{separator}"
        text += "<|im_start|>assistant\n"
        for count in num_tiles:
            context = "<IMG_CONTEXT>" * (self.model.config.image_seq_length * count)
            text = text.replace("<image>", f"<img>{context}</img>", 1)
        return text


def _original_content(turn: Turn) -> str:
    return "".join("<image>\n" if isinstance(part, Picture) else part for part in turn.parts)
