"""transformers' Auto classes know VLMo's folders once both packages are imported, in whatever order."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_processing import SIZES, WORDS

from vlmo_fast import VLMoConfig, VLMoForImageTextRetrieval, VLMoProcessor

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = VLMoForImageTextRetrieval(VLMoConfig(**SIZES))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    VLMoProcessor.from_vocabulary(folder / "vocab.txt", model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def python(folder: Path) -> Callable[[str], str]:
    def run(code: str) -> str:
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", f"folder = {str(folder)!r}\n{code}"]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


IN_THREADS = """
import sys, threading, vlmo_fast
def work():
    from transformers import AutoModel
    AutoModel.from_pretrained(folder)
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
USE = """
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
print(type(AutoProcessor.from_pretrained(folder)).__name__, type(AutoModel.from_pretrained(folder)).__name__)
print([type(x.from_pretrained(folder)).__name__ for x in (AutoImageProcessor, AutoTokenizer)])
"""
USED = "VLMoProcessor VLMoModel\n['VLMoImageProcessor', 'BertTokenizer']\n"
GONE = "assert not any('vlmo_fast' in type(finder).__module__ for finder in sys.meta_path)\n"


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, vlmo_fast, transformers",
        "import sys, transformers, vlmo_fast",
        "import sys; from transformers import AutoModel, AutoProcessor, AutoTokenizer; import vlmo_fast",
        IN_THREADS,
    ],
    ids=["ours first", "theirs first", "theirs in use", "in threads"],
)
def test_folders_are_known(imports: str, python: Callable[[str], str]) -> None:
    before = f"{imports}\nassert 'vlmo_fast.hf' not in sys.modules or 'threading' in dir()\n"
    assert python(before + USE + GONE) == USED


def test_each_auto_class_by_itself(python: Callable[[str], str]) -> None:
    code = """
import multiprocessing, torch
names = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer", "AutoModelForPreTraining")
def work(name):
    import sys, vlmo_fast, transformers
    print(type(getattr(transformers, name).from_pretrained(folder)).__name__, flush=True)
for name in names:
    process = multiprocessing.get_context("fork").Process(target=work, args=(name,))
    process.start(); process.join(); assert process.exitcode == 0
"""
    found = python(code).split()
    assert found == ["VLMoConfig", "VLMoProcessor", "VLMoImageProcessor", "BertTokenizer", "VLMoForPreTraining"]


def test_other_models_do_not_load_ours(python: Callable[[str], str]) -> None:
    code = """
import sys, vlmo_fast
from transformers import AutoConfig, AutoModel, BertConfig
AutoConfig.for_model("bert")
AutoModel.from_config(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
print("vlmo_fast.hf" in sys.modules)
"""
    assert python(code) == "False\n"


def test_transformers_that_is_missing_or_broken(python: Callable[[str], str], tmp_path: Path) -> None:
    """Nothing happens that would not happen without us."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise RuntimeError('broken')")
    code = f"""
import sys, vlmo_fast
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError("no transformers", name=name)
sys.meta_path.insert(0, Missing())
try:
    import transformers
except ModuleNotFoundError as error:
    print(error)
sys.meta_path.pop(0)
sys.path.insert(0, {str(tmp_path)!r})
try:
    import transformers
except RuntimeError as error:
    print(error)
print(vlmo_fast.MoMEConfig().hidden_size)
"""
    assert python(code) == "no transformers\nbroken\n768\n"


def test_without_what_our_classes_need_the_reason_is_told(python: Callable[[str], str]) -> None:
    code = """
import sys, vlmo_fast
from transformers import AutoConfig
sys.modules["vlmo_fast.hf.modeling"] = None
print(AutoConfig.for_model("bert").model_type)
try:
    AutoConfig.from_pretrained(folder)
except ImportError as error:
    print("vlmo_fast.hf.modeling" in str(error))
"""
    assert python(code) == "bert\nTrue\n"
