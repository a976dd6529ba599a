#!/bin/bash
# Two machines of eight GPUs, one process a GPU:  sbatch docs/slurm.sh
# sbatch sends SIGUSR1 to every process two minutes before the time is up; they save, and the job is queued again.
#SBATCH --job-name=alexnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
set -u
run=runs/imagenet/$SLURM_JOB_ID          # on a file system that all machines see
shards=${SHARDS:?folder or URL that alexnet_pl.shards has made}

if [ -f "$run/config.yaml" ]; then       # queued again: go on
    arguments=(resume="$run")
else
    arguments=(experiment=paper_imagenet data=shards data.root="$shards" trainer=ddp data.batch_size=2048
        hydra.run.dir="$run")
fi
mkdir -p "$run"                          # resume=… and all processes find the folder

# --kill-on-bad-exit: the end of one process is the end of all.
srun --kill-on-bad-exit=1 .venv/bin/python train.py "${arguments[@]}"
status=$?
if [ $status -eq $((128 + $(kill -l USR1))) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
