# What launch/keep_running.sh and launch/slurm/pretrain.sbatch do after an attempt; both source this file.

# Put the arguments into the array `kept`, without --run.resume (or --resume) and its value.
keep_all_but_resume() {
    kept=()
    while (($#)); do
        case ${1//-/_} in
            __run.resume=* | __resume=*) ;;
            __run.resume | __resume) [ $# -eq 1 ] || shift ;;
            *) kept+=("$1") ;;
        esac
        shift
    done
}
