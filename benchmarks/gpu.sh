#!/usr/bin/env bash
# The GPU part of `python -m benchmarks`, installation included, in at most six minutes. Without a GPU a dry run:
#   DRY=1 benchmarks/gpu.sh
# Settings: PYTHON (with torch installed), DATA (folder with commonsense/, optional), OUT (results), SECONDS_LEFT,
# and pip's own (PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER: wheels instead of an index).
set -euo pipefail
cd "$(dirname "$0")/.."
began=$SECONDS
python=${PYTHON:-python3}
out=${OUT:-benchmark-results}
limit=${SECONDS_LEFT:-360}
size=(--size gpu --device cuda)
if [[ -n ${DRY:-} ]]; then
    size=(--size tiny --device cpu)
else
    "$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU: DRY=1 for a dry run'"
    # torch is there and fits the driver: it stays as it is, and whatever else is there and new enough
    wanted='import tomllib, torch
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
others = [*project["dependencies"], *project["optional-dependencies"]["peft"]]
print(f"torch=={torch.__version__}", *(other for other in others if not other.startswith("torch>")), sep="\n")'
    mapfile -t wanted < <("$python" -c "$wanted")
    "$python" -m pip install -q --disable-pip-version-check --retries 1 "${wanted[@]}" ||
        echo "Not everything could be installed: going on with what is there." >&2
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
left=$((limit - (SECONDS - began)))
# nothing new is begun in the last minute, and whatever runs is ended at the limit: results.json has what was done
timeout --kill-after=10 "$left" "$python" -m benchmarks "${size[@]}" --out "$out" --seconds $((left - 60)) \
    ${DATA:+--data "$DATA"} || [[ $? == 124 ]]
"$python" -m benchmarks --from "$out/results.json"
