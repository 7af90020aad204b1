# shellcheck shell=bash
# Functions that prepare a start on other machines: they check the command here, before anything is
# created, and bring the data there. Sourced by cluster.sh.

# shellcheck disable=SC2034 # read by the scripts
data='' scratch='' mount='' no_check='' manifest_folder='' data_command=()

DATA_HELP='--data SRC         stored latents in a bucket (gs://BUCKET/FOLDER): every host copies them to its
                   own disk and checks them before each start, also after a preemption, and
                   --config.data.path is set to that copy. An interrupted copy is
                   continued
--scratch DIR      folder of each host for the copy (default: ~/sit_data)'
CHECK_HELP='--no_check         do not check here, before anything is created, that the command can start. The
                   check needs the packages of requirements.txt: in .venv, or PYTHON=/path/to/python'

# read_data DIRECTORY: make --data the data.path of sit_jax.main, below this folder of each host
# unless --scratch names another one. "${data_command[@]}" is then the command that each host runs
# first.
read_data() {
    local argument
    if [ -z "$data" ]; then
        [ -z "$mount$scratch" ] || die "--mount and --scratch need --data"
        return
    fi
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        case $argument in
            --config.data.path | --config.data.path=*)
                die "--data and --config.data.path are both given; give one of them" ;;
        esac
    done
    scratch=${scratch:-$1} data=${data%/}
    [ "$scratch" ] || die "--data needs a folder on the disk of each node; give --scratch DIR"
    # One folder for each source, so that no other copy is in the way.
    argument=${data#*://}
    argument=${scratch%/}/${argument#/}
    arguments+=("--config.data.path=$argument")
    data_command=(bash launch/data.sh copy "$data" "$argument")
    [ -z "$mount" ] || data_command=(bash launch/data.sh mount --install "$data" "$argument")
}

# require_bucket: stop unless --data, if given, is a folder in a bucket.
require_bucket() {
    case $data in
        '' | gs://?*/?*) ;;
        *) die "--data '$data' is not in a bucket, where the machines can read it; copy it to one" \
            "(gcloud storage rsync -r) and give --data gs://BUCKET/FOLDER" ;;
    esac
}

# device_count TYPE: print the number of devices that jax finds on a TPU of this type: KIND-N or
# KIND-AxBxC. AxBxC are chips. N are chips for v5litepod and v6e, and TensorCores, two per chip, for
# the others. jax counts a chip as one device, but each TensorCore on v2, v3 and tpu7x.
device_count() {
    local kind=${1%%-*} size=${1#*-} cores_per_device=1 devices_per_chip=1
    case $kind in
        v2 | v3 | tpu7x) devices_per_chip=2 ;;
        v4 | v5p) cores_per_device=2 ;;
        v5litepod | v6e) ;;
        *) size='' ;;
    esac
    if [[ $size =~ ^[1-9][0-9]{0,4}$ ]]; then
        printf '%s' $((size / cores_per_device))
    elif [[ $size =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]]; then
        printf '%s' $((${size//x/*} * devices_per_chip))
    else
        die "--type '$1' has an unknown number of devices; expected v4-N, v5litepod-N, v5p-N," \
            "v6e-N or tpu7x-N, or --no_check"
    fi
}

# check_start DEVICES OPTION...: stop unless sit_jax.main can start with its arguments on so many
# devices. The options are those of sit_jax.check_command.
check_start() {
    local count=$1 python=${PYTHON:-$root/.venv/bin/python} line status=0
    shift
    command -v "$python" >/dev/null ||
        die "$python does not exist, and would check the arguments before anything is created;" \
            "run python3 -m venv .venv && .venv/bin/pip install -e . in $root, or set" \
            "PYTHON=/path/to/python, or give --no_check"
    line=$(
        unset XLA_FLAGS LIBTPU_INIT_ARGS # those of the run
        cd "$root" && "$python" -m sit_jax.check_command --devices "$count" "$@" \
            ${data:+--brings_data} -- ${arguments[@]+"${arguments[@]}"}
    ) || status=$?
    case $status in
        0) say "checked: $line" ;;
        2) exit 2 ;;
        *) die "$python cannot check the arguments (the reason is above); install the packages of" \
            "requirements.txt there, or give --no_check" ;;
    esac
}

# check_remote_start TYPE SLICES: `check_start` for TPUs, after a look into the bucket of --data.
check_remote_start() {
    local count checks=(--elsewhere)
    if [ "$no_check" ]; then return; fi
    count=$(device_count "$1") || exit
    if [ "$data" ] && [ "$dry_run" ]; then
        say "--dry_run does not read $data"
    elif [ "$mount" ]; then
        gcloud storage ls "$data" >/dev/null || die "gcloud cannot list $data (its reason is above)"
    elif [ "$data" ]; then
        manifest_folder=$(mktemp -d)
        trap 'rm -r "$manifest_folder"' EXIT
        gcloud storage cat "$data/manifest.json" >"$manifest_folder/manifest.json" ||
            die "gcloud cannot read $data/manifest.json (its reason is above); expected the folder" \
                "of stored latents, or --mount for other data"
        checks+=(--manifest "$manifest_folder")
    fi
    check_start $((count * $2)) "${checks[@]}"
}
