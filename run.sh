#!/usr/bin/env bash
# bash run.sh                  reproduces both models on CelebA; needs a CUDA GPU
# bash run.sh demo [FLAG ...]  trains both small, on toy faces, on the CPU, in a few minutes; flags go to main.py
# bash run.sh test [ARG ...]   lints, and runs the tests; arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Installs what a requirements file names, into .venv unless an environment is active.
install() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        [ -x .venv/bin/python3 ] || python3 -m venv .venv
        PATH="$PWD/.venv/bin:$PATH"
    fi
    echo "installing $1 (the first time this takes minutes: PyTorch is large)"
    python3 -m pip install --quiet --disable-pip-version-check -r "$1"
}

# train OUTF FLAG ... starts a run, or continues the one that is in OUTF.
train() {
    local outf=$1 resume=()
    shift
    [ -f "$outf/checkpoint.pth.tar" ] && resume=("--checkpoint=$outf/checkpoint.pth.tar")
    python3 main.py "--outf=$outf" "$@" ${resume[@]+"${resume[@]}"}
}

case "${1:-reproduce}" in
reproduce)
    if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "run.sh: no CUDA GPU here, so nothing was downloaded. A demo runs on the CPU: bash run.sh demo" >&2
        exit 1
    fi
    install requirements.txt
    python3 download_datasets.py celebA
    # LAMBDA is in balance with the default cost on faces; the rates are the paper's (0.001 for the discriminator, which
    # the default, 3 x lr, is close to): see the README, Results.
    celeba=(--dataroot=data/celebA --dataset=celebA --gpu_id=0 --cuda --pz_scale=1 --niter=55 --e_pretrain)
    train gan_outputs "${celeba[@]}" --mode=gan --noise=add_noise --LAMBDA=10 --lr=0.0003
    train mmd_outputs "${celeba[@]}" --mode=mmd --noise=gaussian --LAMBDA=100 --lr=0.001
    ;;
demo)
    install requirements.txt
    python3 download_datasets.py toy
    small=(--dataroot=data/toy --nf=16 --niter=20 --n_samples=1000 --seed=1)
    small+=(--lr=0.001 --lr_adv=0.001 --lr_schedule=scaled) # few steps: see the README, Settings
    demo=${DEMO_OUTPUTS:-demo_outputs}
    train "$demo/gan" "${small[@]}" --mode=gan "${@:2}"
    train "$demo/mmd" "${small[@]}" --mode=mmd "${@:2}"
    echo "Look at these pictures:"
    for model in gan mmd; do
        ls -t "$demo/$model"/fake_samples_epoch_*.png | head -n 1
        ls -t "$demo/$model"/reconstructions_epoch_*.png | head -n 1
    done
    ;;
test)
    install requirements.txt
    install tests/requirements.txt
    python3 -m ruff check .
    python3 -m ruff format --check .
    python3 -m pytest "${@:2}"
    ;;
*)
    echo "usage: bash run.sh [demo [FLAG ...] | test [ARG ...]]" >&2
    exit 2
    ;;
esac
