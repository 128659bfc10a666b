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
    train=(python3 main.py --dataroot=data/celebA --dataset=celebA --gpu_id=0 --cuda --e_pretrain)
    "${train[@]}" --mode=gan --noise=add_noise --LAMBDA=1 --lr=0.0003 --outf=outputs/gan
    "${train[@]}" --mode=mmd --noise=add_noise --LAMBDA=30 --quadratic=0.3 --lr=0.001 \
        --outf=outputs/mmd
    ;;
paper)
    celeba
    train=(python3 main.py --dataroot=data/celebA --cuda --arch=paper --input_normalize_sym --pz_scale=1.4142)
    "${train[@]}" --mode=vae --lr=0.0001 --niter=68 --outf=paper_outputs/vae "${@:2}"
    "${train[@]}" --mode=mmd --noise=add_noise --LAMBDA=100 --mmd=sampled --imq_scales=1 --lr=0.001 \
        --e_pretrain --outf=paper_outputs/mmd "${@:2}"
    "${train[@]}" --mode=gan --noise=add_noise --LAMBDA=1 --lr=0.0003 --lr_adv=0.001 --e_pretrain \
        --outf=paper_outputs/gan "${@:2}"
    ;;
demo)
    install requirements.txt
    python3 download_datasets.py toy
    # Few steps: higher rates, which fall within the run, and more weight on the codes of WAE-GAN.
    train=(python3 main.py --dataroot=data/toy --nf=16 --niter=20 --n_samples=1000)
    train+=(--lr=0.001 --lr_adv=0.001 --lr_schedule=scaled)
    demo=${DEMO_OUTPUTS:-demo_outputs}
    "${train[@]}" --mode=gan --LAMBDA=10 --outf="$demo/gan" "${@:2}"
    "${train[@]}" --mode=mmd --quadratic=0.3 --outf="$demo/mmd" "${@:2}"
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
