# shellcheck shell=bash
# Sourced by the scripts that run sit_jax.main on other machines: their arguments, --dry_run, compiler flags, and TPUs
# that come and go. `arguments` are those of sit_jax.main: what follows -- on the command line.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
. "$root/launch/lib.sh"

arguments=()
dry_run='' flags=''

# read_arguments OPTIONS SWITCHES ARGUMENT...: sets the variable of each --option VALUE (or =VALUE) and --switch.
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
            *) die "unexpected '$argument'; the arguments of sit_jax.main go after --; see --help" ;;
        esac
        option=${argument%%=*}
        option=${option#--}
        case " $switches " in *" ${argument#--} "*) printf -v "$option" yes; continue ;; esac
        case " $options " in
            *" $option "*) ;;
            *) die "unknown option --$option; the arguments of sit_jax.main go after --; see --help" ;;
        esac
        case $argument in
            *=*) argument=${argument#*=} ;;
            *) argument=${1:-}; [ $# -eq 0 ] || shift ;;
        esac
        [ "$argument" ] || die "--$option has no value"
        printf -v "$option" %s "$argument"
    done
}

# need OPTION...: stops if one of these options was not given.
need() {
    local option
    for option in "$@"; do
        [ "${!option}" ] || die "--$option is missing; see --help"
    done
}

# need_remote_run: stops unless sit_jax.main gets a config that is copied and a workdir that outlives the machine.
need_remote_run() {
    local argument previous='' config='' workdir=''
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        case $argument in --config=*) config=${argument#*=} ;; --workdir=*) workdir=${argument#*=} ;; esac
        case $previous in --config) config=$argument ;; --workdir) workdir=$argument ;; esac
        previous=$argument
    done
    case $workdir in
        '') die "no --workdir; give the arguments of sit_jax.main after --, such as --workdir gs://BUCKET/FOLDER" ;;
        *://*) ;;
        *) die "--workdir '$workdir' would go with the machine; expected one in a bucket, such as gs://BUCKET/FOLDER" ;;
    esac
    case $config in
        '' | configs/*) ;;
        *) die "--config '$config' is not copied to the machine; put it in configs/, as seen from the repository" ;;
    esac
}

need_tool() {
    [ "$dry_run" ] || command -v "$1" >/dev/null || die "$1 is not installed; see $2 (--dry_run needs no tool)"
}

# The words as one line that a shell reads back as they are.
quoted() {
    local word escape="'\\''" separator=''
    for word in "$@"; do
        case $word in '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$escape}'" ;; esac
        printf '%s%s' "$separator" "$word"
        separator=' '
    done
}

run() {
    if [ "$dry_run" ]; then
        printf '%s\n' "$(quoted "$@")"
    else
        "$@"
    fi
}

# The flags of a file of compiler_flags/ on one line: one --flag=value a line, # begins a comment.
read_flags() {
    local line words=()
    [ -f "$1" ] || die "--flags '$1' is no file; those that come along are launch/compiler_flags/*.flags"
    while IFS= read -r line || [ "$line" ]; do
        line=${line%%#*}
        line=${line%"${line##*[! ]}"}
        [ "$line" ] || continue
        [[ $line = --?*=?* && $line != *' '* ]] ||
            die "$1 holds the line '$line'; expected --flag=value or # and a comment"
        words+=("$line")
    done <"$1"
    printf '%s' "${words[*]-}"
}

# main_line VARIABLE PYTHON...: the shell line that runs sit_jax.main, with the compiler flags in VARIABLE.
main_line() {
    local environment=() line
    if [ "$flags" ]; then
        line=$(read_flags "$flags") || exit
        environment=(env "$1=$line")
    fi
    shift
    quoted ${environment[@]+"${environment[@]}"} "$@" ${arguments[@]+"${arguments[@]}"}
}

# Passes on what training says; succeeds if it says that it stopped early, saved.
says_it_stopped() {
    local line early=''
    while IFS= read -r line || [ "$line" ]; do # not awk: Debian's holds lines back until it has a block of them
        printf '%s\n' "$line"
        case $line in *', saved; the same command continues'*) early=yes ;; esac
    done
    [ "$early" ]
}

# train COMMAND...: its status, but $STOPPED_EARLY instead of 0 where training stopped early, saved. xpk starts a
# workload again at that status.
STOPPED_EARLY=42
train() {
    local statuses
    { "$@" | says_it_stopped; statuses=("${PIPESTATUS[@]}"); } || true # || keeps set -e out until they are read
    if [ "${statuses[*]}" = "0 0" ]; then return "$STOPPED_EARLY"; fi
    return "${statuses[0]}"
}

# What follows is of tpu_vm.sh and queued_resources.sh. Each has its own create_tpu, delete_tpu (gcloud commands that
# go through run) and tpu_state, which prints the state, READY when it can be used, nothing when there is none.

# shellcheck disable=SC2034 # spot is read by create_tpu
name='' zone='' type='' version='' project='' spot='' delete=''

read_tpu_arguments() {
    read_arguments "name zone type version project" "spot delete" "$@"
    need name zone type
    need_remote_run
    place=(--zone="$zone")
    [ -z "$project" ] || place+=(--project="$project")
    [ "$version" ] || case $type in # https://cloud.google.com/tpu/docs/runtimes
        v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
        *) die "--type '$type' has no known runtime; expected v4-N, v5litepod-N, v5p-N or v6e-N, or give --version too" ;;
    esac
    need_tool gcloud https://cloud.google.com/sdk/docs/install
    remote_line="cd sit_jax && $(main_line LIBTPU_INIT_ARGS .venv/bin/python -m sit_jax.main)"
}

on_all_workers() {
    run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

copy_and_install() {
    local archive="${TMPDIR:-/tmp}/sit_jax.$name.tar.gz"
    run tar -czf "$archive" -C "$root" configs convert launch sit_jax pyproject.toml requirements.txt &&
        run gcloud compute tpus tpu-vm scp "$archive" "$name:sit_jax.tar.gz" "${place[@]}" --worker=all &&
        run rm "$archive" &&
        on_all_workers 'mkdir -p sit_jax && tar -xzf sit_jax.tar.gz -C sit_jax && bash sit_jax/launch/on_tpu_vm.sh'
}

# ask COMMAND...: what gcloud describes, nothing if it is not there, UNREACHABLE (and why) if gcloud cannot tell.
ask() {
    local answer
    if answer=$("$@" 2>/dev/null); then
        printf '%s' "$answer"
    elif answer=$("$@" 2>&1) || [ "${answer/NOT_FOUND/}" = "$answer" ]; then
        printf '%s\n' "$answer" >&2
        printf UNREACHABLE
    fi
}

# make_ready ATTEMPT: returns when the TPU is READY: makes it, waits for it, or replaces it where it was preempted.
make_ready() {
    local state last=unknown
    while :; do
        state=$(tpu_state)
        [ "$state" = "$last" ] || say "$name: ${state:-not there}"
        last=$state
        case $state in
            READY) return ;;
            '')
                say "creating $name"
                if create_tpu; then continue; fi
                [ "$1" -gt 1 ] || die "$name could not be created (gcloud's reason is above)"
                say "no new TPU yet; trying again"
                ;;
            PREEMPTED | TERMINATED | SUSPENDED)
                say "deleting $name, which was preempted"
                if delete_tpu; then continue; fi
                ;;
            UNREACHABLE) [ "$1" -gt 1 ] || die "gcloud cannot tell how $name is (its reason is above)" ;;
            FAILED | STOPPED | HIDDEN | UNKNOWN)
                die "$name is $state; see why, or delete it and run this again: $(dry_run=yes delete_tpu)"
                ;;
        esac
        sleep 30
    done
}

# True if the TPU is READY and still is a minute later: the state follows a preemption late.
stays_ready() {
    local _
    for _ in 1 2 3 4 5 6; do
        [ "$(tpu_state)" = READY ] || return 1
        sleep 10
    done
}

# Makes the TPU, runs sit_jax.main on all its workers, and does so again after each preemption until training is done.
train_on_tpu() {
    local status attempt=0
    if [ "$dry_run" ]; then
        create_tpu
        copy_and_install
        on_all_workers "$remote_line"
        [ -z "$delete" ] || delete_tpu
        return
    fi
    while :; do
        attempt=$((attempt + 1))
        make_ready "$attempt"
        status=0
        { copy_and_install && train on_all_workers "$remote_line"; } || status=$?
        if [ "$status" -eq 0 ]; then break; fi
        if ! stays_ready; then
            say "$name was lost; replacing it and going on from the last checkpoint"
        elif [ "$status" -eq "$STOPPED_EARLY" ]; then
            say "training stopped early, saved; going on"
        else
            die "status $status (its reason is above); $name is kept: run this again, or delete it:" \
                "$(dry_run=yes delete_tpu)"
        fi
    done
    if [ "$delete" ]; then
        delete_tpu
    else
        say "done; $name is kept, and paid for, until you run: $(dry_run=yes delete_tpu)"
    fi
}
