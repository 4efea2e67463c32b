#!/bin/bash
# A run over two nodes with four GPUs each: sbatch slurm.sh
#SBATCH --job-name=lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
#SBATCH --requeue
# Two minutes before the time limit every task is asked to stop, and the run saves.
#SBATCH --signal=TERM@120

# srun gives each task its number; the processes meet at the first node, at a port that follows from the job's number.
# The same command continues the run, so that a job that was requeued goes on from its last run state.
srun lorasmith train photos --model flux1-dev.safetensors --base-dir "$HOME/ComfyUI" --output runs/photos \
    --batch-size 4 --grad-accumulation-steps 2 --save-state-every 50
