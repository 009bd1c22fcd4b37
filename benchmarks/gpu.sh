#!/usr/bin/env bash
# The GPU part of `python -m benchmarks`, installation included, in at most six minutes. Without a GPU a dry run:
#   DRY=1 benchmarks/gpu.sh
# Settings: PYTHON (with torch installed), DATA (folder with commonsense/, optional), OUT (results), SECONDS_LEFT.
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
    # torch is there and fits the driver; the rest is small, and comes from a mirror or a wheel folder if one is set
    "$python" -c "import transformers, lightning, peft, datasets" 2>/dev/null ||
        "$python" -m pip install -q -c constraints.txt --upgrade-strategy only-if-needed \
            transformers lightning datasets torchmetrics "jsonargparse[signatures]" tensorboard safetensors matplotlib rich peft
    "$python" -c "import torch; assert torch.cuda.is_available(), 'no GPU: DRY=1 for a dry run'"
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false
left=$((limit - (SECONDS - began)))
# a section is not begun in the last minute, and whatever runs is ended at the limit: results.json has what was done
timeout --signal=INT "$left" "$python" -m benchmarks "${size[@]}" --out "$out" --seconds $((left - 60)) \
    ${DATA:+--data "$DATA"} || [[ $? == 124 ]]
"$python" -m benchmarks --from "$out/results.json"
