"""What a video or a document may cost to open and to decode."""

from __future__ import annotations

from dataclasses import dataclass, field

# Frames of a video or pages of a document: what a decoder process can tell of in one packet.
MAX_PARTS = 1024


@dataclass(frozen=True)
class ContainerLimits:
    """Checked by the process that decodes; time and memory are limits of that process itself."""

    max_video_bytes: int = field(default=100 << 20, metadata={"help": "most bytes of one video's file"})
    max_video_frames: int = field(
        default=128, metadata={"help": "most frames that a request may ask for per video"}
    )
    max_stored_frames: int = field(
        default=250_000, metadata={"help": "most frames that a video's file may hold"}
    )
    max_document_bytes: int = field(default=50 << 20, metadata={"help": "most bytes of one PDF's file"})
    max_pages: int = field(default=64, metadata={"help": "most pages of one PDF"})
    max_part_pixels: int = field(
        default=9_000_000, metadata={"help": "most pixels of a frame, and of a page as it is rendered"}
    )
    decode_processes: int = field(
        default=2, metadata={"help": "processes that decode videos and PDFs; as many more read headers"}
    )
    decode_memory_mib: int = field(
        default=1024, metadata={"help": "memory of a process that decodes a video or PDF, MiB"}
    )
    open_timeout_s: float = field(
        default=4.0, metadata={"help": "seconds to read a video's or PDF's headers, and to wait for it"}
    )
    decode_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds to decode frames or pages that are decoded together"}
    )

    def __post_init__(self) -> None:
        for name in (
            "max_video_bytes",
            "max_video_frames",
            "max_stored_frames",
            "max_document_bytes",
            "max_pages",
            "max_part_pixels",
            "decode_processes",
            "decode_memory_mib",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("max_video_frames", "max_pages"):
            if getattr(self, name) > MAX_PARTS:
                raise ValueError(f"{name} must be <= {MAX_PARTS}, got {getattr(self, name)}")
        for name in ("open_timeout_s", "decode_timeout_s"):
            if not getattr(self, name) > 0:  # NaN is not
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
