# What is particular to your cluster. Copy to slurm/site.sh (not committed) and keep what you need.
# run.sbatch and preflight.sbatch read it on the first node. For the SBATCH_* lines, which count
# when a job is submitted, read it once in your shell too: source slurm/site.sh

# --- options of sbatch: they go before the #SBATCH lines of the script, after the command line
export SBATCH_ACCOUNT=myproject
export SBATCH_PARTITION=gpu
# export SBATCH_QOS=long
# export SBATCH_TIMELIMIT=12:00:00
# export SBATCH_GPUS_PER_NODE=4         # nodes with 4 GPUs

# --- the environment of the program: one of these
# module load python/3.11 cuda/12.4
# source ~/venvs/spmd_rl/bin/activate   # not needed for the .venv beside the repository
# CONTAINER=(apptainer exec --nv --bind /scratch "$HOME/spmd_rl.sif")

# --- the network, if NCCL or gloo choose the wrong interface
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# --- how the job runs
# export MAX_RESTARTS=3                 # a failure within one allocation starts all ranks again
