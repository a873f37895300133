#!/usr/bin/env bash
# Repeats every measurement that README.md and docs/performance.md quote. Takes about fifteen minutes
# on a machine that does nothing else.
#
#   bench/record.sh [PYTHON [DEVICE]]      writes bench/results/DEVICE-*.json, .png and .txt
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
device=${2:-$("$python" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")}
results=bench/results/$device
export PYTHONUNBUFFERED=1

record() { # NAME ARGUMENTS...
    local to=$results-$1
    shift
    "$python" -m bench --device "$device" "$@" --json "$to.json" | tee "$to.txt"
}

record quick --plot "$results-quick.png"
record resnet50 --suite resnet50 --provider bnorm_ext torch --time-budget 120 \
    --plot "$results-resnet50.png"
record mixed --suite mixed --provider bnorm_ext torch --cache warm --time-budget 150
record fused --suite fused --provider bnorm_ext bnorm_ext-unfused torch --cache warm --time-budget 150
record sweep-spatial --suite sweep-spatial --provider bnorm_ext torch --cache both --time-budget 90 \
    --plot "$results-sweep-spatial.png"
record large --shape 32,64,56,56 --provider bnorm_ext torch torch.compile --cache both \
    --pass fwd eval bwd fwd+bwd --time-budget 60
train() { # MODEL ARGUMENTS...
    "$python" -m bench.train --device "$device" --model "$@" --json "$results-train-$1.json" |
        tee "$results-train-$1.txt"
}
small=()
[ "$device" = cpu ] && small=(--batch 16 --size 112)
for model in resnet50 mobilenet_v2 densenet121; do train "$model" "${small[@]}"; done
"$python" -m bench.profile --device "$device" --shape 32,64,56,56 2>/dev/null |
    tee "$results-profile.txt"
