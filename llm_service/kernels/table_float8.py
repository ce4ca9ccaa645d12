"""Empty until `python -m llm_service.kernels.timing --tune --weights fp8 --write` has run: all by rule."""

from llm_service.kernels.linear_config import Table

TABLE: Table = {}
