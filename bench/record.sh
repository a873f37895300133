#!/usr/bin/env bash
# Repeats the measurements that README.md and docs/performance.md quote, each into a file of its own.
# Those of kernels alone, of a GPU's terms and of host times (bench/results/README.md) have other programs.
# On the CPU it takes 40 minutes on a machine that does nothing else. On a GPU, where `make gpu-check`
# comes first, it is not yet timed.
#
#   bench/record.sh [PYTHON [DEVICE [NAME...]]]      NAME: single measurements, such as quick
#
# Writes bench/results/DEVICE-NAME.json, .txt and, of some, .png. RECORD_DRY=1 prints the commands.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
device=${2:-$("$python" -c "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')")}
chosen=("${@:3}")
found=0
export PYTHONUNBUFFERED=1

run() { # NAME PROGRAM ARGUMENTS...
    local name=$1 program=$2
    shift
    if [ ${#chosen[@]} -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
    found=1
    if [ "${RECORD_DRY:-0}" != 0 ]; then
        echo "$program --device $device ${*:2}"
        return
    fi
    "$python" -m "$program" --device "$device" "${@:2}" | tee "bench/results/$device-$name.txt"
}

record() { # NAME ARGUMENTS...
    run "$1" bench "${@:2}" --json "bench/results/$device-$1.json"
}

plotted() { # NAME ARGUMENTS...
    record "$@" --plot "bench/results/$device-$1.png"
}

step() { # NAME MODEL ARGUMENTS...
    run "$1" bench.train --model "${@:2}" --json "bench/results/$device-$1.json"
}

on_cpu() {
    local ours_and_torch=(--provider bnorm_ext torch)
    plotted quick
    plotted resnet50 --suite resnet50 "${ours_and_torch[@]}" --time-budget 120
    plotted sweep-spatial --suite sweep-spatial "${ours_and_torch[@]}" --cache both --time-budget 90
    record mixed --suite mixed "${ours_and_torch[@]}" --cache warm --time-budget 150
    record fused --suite fused --provider bnorm_ext bnorm_ext-unfused torch --cache warm --time-budget 150
    record large --shape 32,64,56,56 --provider bnorm_ext torch torch.compile --cache both \
        --pass fwd eval bwd fwd+bwd --time-budget 60
    local shapes=(16,1024,7,7 64,512,7,7 48,1280,4,4 1,64,512,1024 16,96,56,56 16,256,28,28) of
    of=(--shape "${shapes[@]}" --pass fwd bwd eval fwd+bwd --dtype float32 bfloat16)
    of+=(--layout contiguous channels_last "${ours_and_torch[@]}" --cache warm --time-budget 100)
    record more-shapes "${of[@]}" --threads 2
    record more-shapes-one-thread "${of[@]}" --threads 1

    run profile bench.profile --shape 32,64,56,56

    local small=(--batch 16 --size 112) model layout
    for model in mobilenet_v2 resnet50 densenet121; do
        step "train-$model" "$model" "${small[@]}"
    done
    for model in mobilenet_v2 resnet50; do
        for layout in contiguous channels_last; do
            local as=("$model" "${small[@]}" --processes 5)
            [ $layout = channels_last ] && as+=(--channels-last)
            # glibc keeps what was freed, so that no step asks the system for fresh pages.
            MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368 \
                step "steps-$model-$layout" "${as[@]}" --time-budget 2
            step "inference-$model-$layout" "${as[@]}" --inference --time-budget 2
        done
    done
}

on_cuda() {
    local native=(--provider bnorm_ext torch torch-nocudnn) all=(--dtype bfloat16 float16 float32)
    local training=(--pass fwd bwd --layout contiguous channels_last "${native[@]}") model batch mode
    record resnet50 --suite resnet50 --batch 64 "${all[@]}" "${training[@]}" --time-budget 8
    record mobilenet_v2 --suite mobilenet_v2 --batch 64 "${all[@]}" "${training[@]}" --time-budget 8
    for batch in 32 256; do
        record resnet50-batch$batch --suite resnet50 --batch $batch "${all[@]}" "${training[@]}" \
            --time-budget 6
    done
    record resnet50-inference --suite resnet50 --batch 64 "${all[@]}" --pass eval \
        --layout contiguous channels_last "${native[@]}" --time-budget 6
    record fused --suite fused --batch 64 --dtype bfloat16 float32 --layout contiguous channels_last \
        --pass fwd bwd --provider bnorm_ext bnorm_ext-unfused torch --time-budget 6
    record others --shape 64,256,56,56 64,512,28,28 64,1024,14,14 "${all[@]}" --layout contiguous \
        --pass fwd bwd --time-budget 6 # every provider that is installed

    local step_of=(--amp bfloat16 --batch 128 --time-budget 6)
    for model in resnet50 mobilenet_v2; do
        step "train-$model-contiguous" "$model" "${step_of[@]}"
        step "train-$model-channels_last" "$model" --channels-last "${step_of[@]}"
        for mode in default reduce-overhead; do
            step "train-$model-compile-$mode" "$model" --channels-last --compile $mode "${step_of[@]}"
        done
    done
}

"on_$device"
if [ $found = 0 ]; then
    echo "record.sh: no measurement is named ${chosen[*]}" >&2
    exit 2
fi
