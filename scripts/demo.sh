#!/usr/bin/env bash
# The main job on a real model, from nothing: convert, verify, register, complete. Writes .venv, .demo and .cache only.
set -euo pipefail
cd "$(dirname "$0")/.."

./scripts/setup.sh gguf
export PATH="$PWD/.venv/bin:$PATH" PORTER_HOME="$PWD/.demo/home" HF_HUB_OFFLINE=1 XDG_CACHE_HOME="$PWD/.cache"
say() { printf '\n$ %s\n' "$*"; "$@"; }

say python scripts/make_smollm2.py .demo/smollm2
say porter convert llama -o .demo/llama
say porter verify .demo/llama --model .demo/smollm2
say porter register .demo/llama
say porter complete .demo/smollm2 "The capital of France is" --max-tokens 8
printf '\n$ echo "What is the capital of France?" | porter chat .demo/smollm2\n'
echo "What is the capital of France?" | porter chat .demo/smollm2

cat <<END

To go on from here:
  source .venv/bin/activate
  export PORTER_HOME=$PORTER_HOME
  porter chat .demo/smollm2
END
