"""OpenAI JSON to protobuf and back. Imports neither torch nor transformers."""
