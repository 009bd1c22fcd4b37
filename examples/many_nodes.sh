#!/usr/bin/env bash
# Several machines: run this on each of them, at about the same time. All of them must see the working directory, which
# gets the run. docs/distributed.md has SLURM, restarts, and what a lost machine does.
#
#   NODE=0 NODES=2 MASTER=10.0.0.1 examples/many_nodes.sh Qwen/Qwen2.5-1.5B rows.jsonl
#   NODE=1 NODES=2 MASTER=10.0.0.1 examples/many_nodes.sh Qwen/Qwen2.5-1.5B rows.jsonl
set -euo pipefail
base=$1 rows=$2
shift 2

# trainer/ddp has the whole base on each device; trainer/fsdp shards it, for one that does not fit beside activations.
# A second call goes on where the first was stopped: --ckpt_path last.
exec torchrun --nnodes "${NODES:-1}" --node-rank "${NODE:-0}" --nproc-per-node "${DEVICES:-gpu}" \
    --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29400}" \
    -m talklora_pl fit --config method/talklora --config "trainer/${STRATEGY:-ddp}" \
    --model.base.path "$base" --data.train "$rows" --run_name many-nodes --ckpt_path last "$@"
