# shellcheck shell=bash
# Functions for the scripts that run sit_jax.main on other machines: options, --dry_run, compiler
# flags, and TPUs that may be preempted. Sourced by those scripts.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
. "$root/launch/lib.sh"
# shellcheck source=launch/prepare.sh
. "$root/launch/prepare.sh"

arguments=() # those of sit_jax.main: everything after -- on the command line
dry_run='' flags=''

# read_arguments OPTIONS SWITCHES ARGUMENT...: read --OPTION VALUE, --OPTION=VALUE and --SWITCH into
# the variables of these names.
read_arguments() {
    local options="$1 flags" switches="$2 dry_run" argument option
    shift 2
    while [ $# -gt 0 ]; do
        argument=$1
        shift
        case $argument in
            -h | --help) usage; exit ;;
            --) arguments=("$@"); break ;;
            --?*) ;;
            *) die "unexpected '$argument'; arguments of sit_jax.main go after --; see --help" ;;
        esac
        option=${argument%%=*}
        option=${option#--}
        case " $switches " in
            *" ${argument#--} "*) printf -v "$option" yes; continue ;;
        esac
        case " $options " in
            *" $option "*) ;;
            *) die "unknown option --$option; arguments of sit_jax.main go after --; see --help" ;;
        esac
        case $argument in
            *=*) argument=${argument#*=} ;;
            *) argument=${1:-}; [ $# -eq 0 ] || shift ;;
        esac
        [ "$argument" ] || die "--$option has no value"
        printf -v "$option" %s "$argument"
    done
}

# require_options OPTION...: stop if one of these options was not given.
require_options() {
    local option
    for option in "$@"; do
        [ "${!option}" ] || die "--$option is missing; see --help"
    done
}

# Stop unless sit_jax.main gets a workdir that outlives the machine, and a config (if any) that is
# copied to the machine.
require_remote_arguments() {
    local argument previous='' config='' workdir=''
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        case $argument in
            --config=*) config=${argument#*=} ;;
            --workdir=*) workdir=${argument#*=} ;;
        esac
        case $previous in
            --config) config=$argument ;;
            --workdir) workdir=$argument ;;
        esac
        previous=$argument
    done
    case $workdir in
        '') die "no --workdir; give the arguments of sit_jax.main after --," \
            "such as --workdir gs://BUCKET/FOLDER" ;;
        *://*) ;;
        *) die "--workdir '$workdir' would be lost with the machine; expected a folder in a" \
            "bucket, such as gs://BUCKET/FOLDER" ;;
    esac
    case $config in
        '' | configs/*) ;;
        *) die "--config '$config' is not copied to the machine; put the file into the folder" \
            "configs of this repository and give --config configs/NAME.py" ;;
    esac
}

# require_tool COMMAND URL: stop if the command is not installed and is needed.
require_tool() {
    [ "$dry_run" ] || command -v "$1" >/dev/null ||
        die "$1 is not installed; see $2 (--dry_run works without it)"
}

# Print the words as one line that a shell splits into the same words.
quote() {
    local word escape="'\\''" separator=''
    for word in "$@"; do
        case $word in '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$escape}'" ;; esac
        printf '%s%s' "$separator" "$word"
        separator=' '
    done
}

# Run the command, or print it if --dry_run was given.
run() {
    if [ "$dry_run" ]; then
        printf '%s\n' "$(quote "$@")"
    else
        "$@"
    fi
}

# Print the flags of a file as one line. The file holds one --flag=value per line; a comment starts
# with #.
read_flags() {
    local line words=()
    [ -f "$1" ] ||
        die "--flags '$1' is not a file; this repository has launch/compiler_flags/*.flags"
    while IFS= read -r line || [ "$line" ]; do
        line=${line%%#*}
        line=${line%"${line##*[! ]}"}
        [ "$line" ] || continue
        [[ $line = --?*=?* && $line != *' '* ]] ||
            die "$1 holds the line '$line'; expected --flag=value or a comment after #"
        words+=("$line")
    done <"$1"
    printf '%s' "${words[*]-}"
}

# main_command VARIABLE PYTHON...: print the shell command that runs sit_jax.main, with the compiler
# flags in the environment variable VARIABLE.
main_command() {
    local environment=() flags_line
    if [ "$flags" ]; then
        flags_line=$(read_flags "$flags") || exit
        environment=(env "$1=$flags_line")
    fi
    shift
    quote ${environment[@]+"${environment[@]}"} "$@" ${arguments[@]+"${arguments[@]}"}
}

# Copy standard input to standard output. Succeed if training reported that it saved and stopped
# early. (Not awk: Debian's buffers its output in blocks, which would delay the log.)
reports_early_stop() {
    local line early=''
    while IFS= read -r line || [ "$line" ]; do
        printf '%s\n' "$line"
        case $line in *', saved; the same command continues'*) early=yes ;; esac
    done
    [ "$early" ]
}

# train COMMAND...: return the command's status, or $STOPPED_EARLY in place of 0 if training saved
# and stopped early. xpk restarts a workload that ends with this status.
STOPPED_EARLY=42
train() {
    local statuses
    # `|| true` keeps set -e from ending the script before the statuses are read.
    { "$@" | reports_early_stop; statuses=("${PIPESTATUS[@]}"); } || true
    if [ "${statuses[*]}" = "0 0" ]; then return "$STOPPED_EARLY"; fi
    return "${statuses[0]}"
}

# The functions below are for tpu_vm.sh and queued_resources.sh. Each of these defines create_tpu
# and delete_tpu (gcloud commands, called through `run`) and tpu_state, which prints the state of
# the TPU: READY when it can be used, nothing when it does not exist.

# shellcheck disable=SC2034 # spot is read by create_tpu
name='' zone='' type='' version='' project='' spot='' delete=''

read_tpu_arguments() {
    read_arguments "name zone type version project data scratch" "spot delete mount no_check" "$@"
    require_options name zone type
    require_bucket
    require_remote_arguments
    # shellcheck disable=SC2088 # each host expands the ~
    if [ "$mount" ]; then read_data '~/sit_mounts'; else read_data '~/sit_data'; fi
    place=(--zone="$zone")
    [ -z "$project" ] || place+=(--project="$project")
    [ "$version" ] || case $type in # https://cloud.google.com/tpu/docs/runtimes
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
        *) die "--type '$type' has no known runtime; expected v4-N, v5litepod-N, v5p-N or v6e-N," \
            "or give --version as well" ;;
    esac
    require_tool gcloud https://cloud.google.com/sdk/docs/install
    check_remote_start "$type" 1
    remote_command="cd sit_jax && $(main_command LIBTPU_INIT_ARGS .venv/bin/python -m sit_jax.main)"
}

on_all_workers() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

copy_and_install() {
    local archive="${TMPDIR:-/tmp}/sit_jax.$name.tar.gz"
    local copied=(configs convert launch sit_jax pyproject.toml requirements.txt)
    local unpack='mkdir -p sit_jax && tar -xzf sit_jax.tar.gz -C sit_jax'
    run tar -czf "$archive" -C "$root" "${copied[@]}" &&
        run gcloud compute tpus tpu-vm scp "$archive" "$name:sit_jax.tar.gz" "${place[@]}" \
            --worker=all &&
        run rm "$archive" &&
        on_all_workers "$unpack && bash sit_jax/launch/on_tpu_vm.sh"
}

bring_data() {
    [ -z "$data" ] || on_all_workers "cd sit_jax && $(quote "${data_command[@]}")"
}

# query COMMAND...: print the output of a gcloud command that describes a resource, nothing if the
# resource does not exist, or UNREACHABLE (and gcloud's message on stderr) if gcloud cannot tell.
query() {
    local answer
    if answer=$("$@" 2>/dev/null); then
        printf '%s' "$answer"
    elif answer=$("$@" 2>&1) || [ "${answer/NOT_FOUND/}" = "$answer" ]; then
        printf '%s\n' "$answer" >&2
        printf UNREACHABLE
    fi
}

# make_ready ATTEMPT: return when the TPU is READY. Create the TPU if it does not exist, wait while
# it starts, and delete it first if it was preempted. A failure to create or to reach it is an error
# on the first attempt, and is retried on later ones, since the TPU worked before.
make_ready() {
    local state last=unknown
    while :; do
        state=$(tpu_state)
        [ "$state" = "$last" ] || say "$name: ${state:-does not exist}"
        last=$state
        case $state in
            READY) return ;;
            '')
                say "creating $name"
                if create_tpu; then continue; fi
                [ "$1" -gt 1 ] || die "$name could not be created (gcloud's reason is above)"
                say "no TPU is available yet; trying again"
                ;;
            PREEMPTED | TERMINATED | SUSPENDED)
                say "deleting $name, which was preempted"
                if delete_tpu; then continue; fi
                ;;
            UNREACHABLE)
                [ "$1" -gt 1 ] || die "gcloud cannot read the state of $name (its reason is above)"
                ;;
            FAILED | STOPPED | HIDDEN | UNKNOWN)
                die "$name is $state; find out why, or delete it and run this again:" \
                    "$(dry_run=yes delete_tpu)"
                ;;
        esac
        sleep 30
    done
}

# Succeed if the TPU is READY and stays so for a minute: its state lags behind a preemption.
stays_ready() {
    local _
    for _ in 1 2 3 4 5 6; do
        [ "$(tpu_state)" = READY ] || return 1
        sleep 10
    done
}

# Create the TPU and run sit_jax.main on all its workers; repeat both after each preemption, until
# training is done.
train_on_tpu() {
    local status attempt=0
    if [ "$dry_run" ]; then
        create_tpu
        copy_and_install
        bring_data
        on_all_workers "$remote_command"
        [ -z "$delete" ] || delete_tpu
        return
    fi
    while :; do
        attempt=$((attempt + 1))
        make_ready "$attempt"
        status=0
        { copy_and_install && bring_data && train on_all_workers "$remote_command"; } || status=$?
        if [ "$status" -eq 0 ]; then break; fi
        if ! stays_ready; then
            say "$name was lost; replacing it and continuing from the last checkpoint"
        elif [ "$status" -eq "$STOPPED_EARLY" ]; then
            say "training stopped early after saving; continuing"
        else
            die "failed with status $status (the reason is above); $name still exists: run this" \
                "again, or delete it: $(dry_run=yes delete_tpu)"
        fi
    done
    if [ "$delete" ]; then
        delete_tpu
    else
        say "done; $name still exists, and is billed, until you run: $(dry_run=yes delete_tpu)"
    fi
}
