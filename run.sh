#!/usr/bin/env bash
# bash run.sh                  trains this repository's two models on CelebA; needs a CUDA GPU
# bash run.sh paper [FLAG ...] trains the paper's three models, with its settings; needs a CUDA GPU
# bash run.sh demo [FLAG ...]  trains two small models on toy faces, on the CPU, in a few minutes
# bash run.sh test [ARG ...]   lints, and runs the tests
# FLAGs go to main.py, ARGs to pytest. The same command again continues what was interrupted.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # as in `sh run.sh`
set -euo pipefail
CDPATH= cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

# Installs what a requirements file names, into .venv unless an environment is active.
install() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        if ! .venv/bin/python3 -m pip --version >/dev/null 2>&1; then
            rm -rf .venv # half-made, if it is there
            python3 -m venv .venv || {
                echo "run.sh: no virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2
                exit 1
            }
        fi
        PATH="$PWD/.venv/bin:$PATH"
    fi
    echo "installing $1 (the first time this takes minutes: PyTorch is large)"
    python3 -m pip install --quiet --disable-pip-version-check -r "$1"
}

celeba() {
    if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
        echo "run.sh: there is no CUDA GPU here; on a CPU, try: bash run.sh demo" >&2
        exit 1
    fi
    install requirements.txt
    python3 download_datasets.py celebA
}

case "${1:-reproduce}" in
reproduce)
    celeba
    for mode in gan mmd; do
        python3 main.py --dataroot=data/celebA --cuda --amp --mode=$mode --outf=outputs/$mode
    done
    ;;
paper)
    celeba
    train=(python3 main.py --dataroot=data/celebA --cuda --arch=paper --input_normalize_sym --pz_scale=1.4142)
    "${train[@]}" --mode=vae --lr=0.0001 --niter=68 --lr_schedule=paper --outf=outputs/paper/vae "${@:2}"
    "${train[@]}" --mode=mmd --LAMBDA=100 --mmd=sampled --imq_scales=1 --quadratic=0 --outf=outputs/paper/mmd "${@:2}"
    "${train[@]}" --mode=gan --lr_adv=0.001 --outf=outputs/paper/gan "${@:2}"
    ;;
demo)
    install requirements.txt
    python3 download_datasets.py toy
    # There are few steps, so rates are higher, and the codes of WAE-GAN weigh more.
    train=(python3 main.py --dataroot=data/toy --nf=16 --niter=20)
    demo=${DEMO_OUTPUTS:-outputs/demo}
    "${train[@]}" --mode=gan --LAMBDA=10 --lr=0.001 --lr_adv=0.001 --outf="$demo/gan" "${@:2}"
    "${train[@]}" --mode=mmd --LAMBDA=100 --outf="$demo/mmd" "${@:2}"
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
    echo "usage: bash run.sh [paper [FLAG ...] | demo [FLAG ...] | test [ARG ...]]" >&2
    exit 2
    ;;
esac
