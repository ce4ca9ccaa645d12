"""The architecture, enforced: who may import whom, read from the source of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).parent.parent
SERVICES = ("encoder_service", "llm_service", "gateway")
PACKAGES = ("protos", *SERVICES, "deploy")

# The only modules outside protos/ that see protobuf messages: servicers, clients, translations.
WIRE_MODULES = {
    "encoder_service.servicer",
    "encoder_service.stream_reader",
    "encoder_service.stream_writer",
    "encoder_service.to_proto",
    "encoder_service.from_proto",
    "llm_service.servicer",
    "llm_service.to_proto",
    "llm_service.from_proto",
    "llm_service.encode_stream",
    "llm_service.encode_requests",
    "llm_service.encoder_pool",
    "llm_service.ring_client",
    "gateway.translate",
    "gateway.llm_client",
    "gateway.llm_target",
    "gateway.session",
    "llm_service.session",
}
# Plain bookkeeping, testable without tensors, sockets or an event loop.
SANS_IO = ("scheduler", "block_manager", "sequence", "visual_store")
JUNK_DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    """Hand-written modules by name."""
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    return {
        module_name(file): ast.parse(file.read_text(encoding="utf-8"), str(file))
        for file in files
        if "_pb2" not in file.stem
    }


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, inside_functions: bool) -> set[str]:
    """Modules imported below `node` at run time; `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not inside_functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"relative import at line {child.lineno}"
            assert child.module is not None
            found |= {child.module, *(f"{child.module}.{alias.name}" for alias in child.names)}
        else:
            found |= imports(child, inside_functions)
    return found


def imported_by(module: str) -> set[str]:
    return imports(sources()[module], inside_functions=True)


def loaded_with(module: str, through: tuple[str, ...] = PACKAGES) -> set[str]:
    """Everything that importing `module` loads, followed through the modules of these packages."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in sources() and name.partition(".")[0] in through:
            todo += imports(sources()[name], inside_functions=False)
            todo += [name.rpartition(".")[0]] if "." in name else []
    return seen


def top_level(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def modules_of(package: str) -> list[str]:
    return sorted(name for name in sources() if name.partition(".")[0] == package)


@pytest.mark.parametrize("package", [*SERVICES, "protos"])
def test_no_service_imports_another_service_and_nothing_imports_deploy(package: str) -> None:
    forbidden = {*SERVICES, "deploy", "tests"} - {package}
    for module in modules_of(package):
        assert not top_level(imported_by(module)) & forbidden, module


def test_the_gateway_imports_no_tensor_library_directly_or_through_protos() -> None:
    forbidden = {"torch", "torchvision", "transformers", "numpy", "timm", "safetensors", "PIL"}
    for module in modules_of("gateway"):
        assert not top_level(imported_by(module) | loaded_with(module)) & forbidden, module


def test_the_gateway_runs_where_torch_is_not_installed() -> None:
    """The real import, third-party packages included."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'numpy')))"
    code = f"{blocked}; from deploy.cli import main; raise SystemExit(main(['gateway', '--help']))"
    code = f"{blocked}; import gateway.app; {code}"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "--llm" in finished.stdout


WITHOUT_TRANSFORMERS = """
import sys
from pathlib import Path

sys.modules["transformers"] = None
import encoder_service.process, llm_service.engine, llm_service.engine_process, llm_service.process
from llm_service.prompt import ImagePart, Message, PromptBuilder, TextPart
from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import open_checkpoint

checkpoint = open_checkpoint(sys.argv[1])
tokenizer = load_tokenizer(checkpoint.folder)
builder = PromptBuilder.from_checkpoint(checkpoint, tokenizer)
prompt = builder.build([Message("user", (ImagePart(0), TextPart("What is it?")))], [3])
print(tokenizer.decode(prompt.token_ids, skip_special_tokens=False))
assert not [name for name in sys.modules if name.startswith("transformers.")]
"""


def test_an_original_checkpoint_is_served_where_transformers_is_not_installed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3", "chat")
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(folder)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    turn = "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat is it?<|im_end|>\n"
    assert finished.stdout.endswith(f"{turn}<|im_start|>assistant\n\n")


@pytest.mark.parametrize("package", SERVICES)
def test_protobuf_types_stop_at_the_wire_modules(package: str) -> None:
    for module in set(modules_of(package)) - WIRE_MODULES:
        wire_types = {name for name in imported_by(module) if name.startswith("protos.") and "_pb2" in name}
        assert not wire_types, module


@pytest.mark.parametrize("name", SANS_IO)
def test_bookkeeping_knows_neither_tensors_nor_io(name: str) -> None:
    module = f"llm_service.{name}"
    # protos.errors is theirs to raise; what it needs of gRPC is not their business.
    loaded = loaded_with(module, through=("llm_service",)) | imported_by(module)
    assert not top_level(loaded) & {"torch", "numpy", "grpc", "asyncio", "socket", "multiprocessing"}, module


@pytest.mark.parametrize(
    "process",
    ["encoder_service.process", "llm_service.process", "llm_service.engine_process", "deploy.cli"],
)
def test_no_process_loads_cuda_only_packages_before_it_knows_its_device(process: str) -> None:
    assert not top_level(loaded_with(process)) & {"flash_attn", "flashinfer", "triton"}


def test_nothing_unpickles_or_runs_remote_code() -> None:
    for module, tree in sources().items():
        assert not top_level(imported_by(module)) & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, (
            module
        )
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), module
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) == "False", module


def test_no_import_is_tried() -> None:
    for module, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Try):
                assert not any(isinstance(child, ast.Import | ast.ImportFrom) for child in node.body), module


def test_only_deploy_reads_the_environment() -> None:
    for module, tree in sources().items():
        if module.partition(".")[0] != "deploy":
            read = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not read & {"os.environ", "os.getenv", "os.environb"}, module


def test_no_module_is_a_junk_drawer_and_none_keeps_globals() -> None:
    for module, tree in sources().items():
        assert not set(module.split(".")) & JUNK_DRAWERS, module
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)], module


def test_every_module_says_what_it_is_for() -> None:
    silent = [module for module, tree in sources().items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_every_test_file_mirrors_a_module() -> None:
    for test in (ROOT / "tests").rglob("test_*.py"):
        folder = test.parent.relative_to(ROOT / "tests")
        if folder.parts and folder.parts[0] in PACKAGES:
            mirrored = ROOT / folder / test.name.removeprefix("test_")
            assert mirrored.is_file(), f"{test.relative_to(ROOT)} has no {mirrored.relative_to(ROOT)}"
