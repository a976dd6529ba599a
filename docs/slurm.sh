#!/bin/bash
# Two nodes of eight GPUs, one rank per GPU:  sbatch docs/slurm.sh
# Two minutes before the time limit sbatch sends SIGUSR1 to every rank. The run saves, and the job is requeued.
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
run=runs/imagenet/$SLURM_JOB_ID          # on a file system that all nodes see
shards=${SHARDS:?directory or URL that alexnet shards has written}

if [ -f "$run/config.yaml" ]; then       # requeued: resume
    arguments=(resume="$run")
else
    arguments=(experiment=paper_imagenet data=shards data.root="$shards" trainer=ddp data.batch_size=2048
        hydra.run.dir="$run")
fi
mkdir -p "$run"                          # resume=… and all ranks need the directory

# --kill-on-bad-exit: when one rank ends, all end.
srun --kill-on-bad-exit=1 .venv/bin/python train.py "${arguments[@]}"
status=$?
if [ $status -eq $((128 + $(kill -l USR1))) ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
