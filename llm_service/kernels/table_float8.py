"""To be measured by `python -m llm_service.kernels.timing --tune --weights fp8 --write`; until then all by rule."""

from llm_service.kernels.linear_config import Table

TABLE: Table = {}
