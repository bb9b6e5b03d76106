#!/bin/bash
# A prompt file over a Slurm array, one GPU per task:
#   sbatch examples/cluster/slurm_array.sh --task t2v-A14B --ckpt_dir Wan2.2-T2V-A14B --prompt_file prompts.txt --save_dir DIR
# A task that died is finished by the same command again, with the same array: a smaller one would divide otherwise.
#SBATCH --job-name=wan
#SBATCH --array=0-3
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
exec python generate.py --shard slurm --base_seed 42 --resume "$@"
