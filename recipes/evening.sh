#!/bin/bash
# Recipes one after another on one GPU, through the night: all are checked, then each is trained and evaluated.
#
#   [DATA=DIR] [OUT=DIR] recipes/evening.sh [RECIPE ...] [section.key=value ...]
#
# RECIPE             name of a recipe, or a YAML file; without any: cifar10-resnet18 cifar100-resnet18, a night on one GPU (docs/cost.md)
# section.key=value  replaces a value in all of them, such as hub.license=apache-2.0
# DATA               folder of the images: DATA/cifar10, DATA/imagenet100, ... A recipe reads the folder that is named like its own name up to the first
#                    hyphen. If there is none, it reads what it names itself, such as CIFAR from the Hub.
# OUT                folder of the results: OUT/RECIPE is a run, OUT/RECIPE/eval.json its accuracy, OUT/evening.log what was said (runs/evening if not given)
#
# The same command goes on where it was stopped. If a recipe fails, the next one begins; the end names it, and the exit code is that of the first failure.
# Ctrl-C or SIGTERM saves a checkpoint and ends all. Over ssh: nohup recipes/evening.sh > /dev/null &
set -uo pipefail

say() { echo "evening.sh: $*"; }
refuse() { say "$2" >&2; exit "$1"; }

recipes=() overrides=() names=" "
for word in "$@"; do
    case $word in
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) refuse 2 "$word: no such option; expected [DATA=DIR] [OUT=DIR] evening.sh [RECIPE ...] [section.key=value ...]" ;;
        *=*) overrides+=("$word") ;;
        *) recipes+=("$word") ;;
    esac
done
[ "${#recipes[@]}" -gt 0 ] || recipes=(cifar10-resnet18 cifar100-resnet18)
for recipe in "${recipes[@]}"; do
    name=$(basename "$recipe" .yaml)
    [[ $names != *" $name "* ]] || refuse 2 "$recipe: a second recipe named $name would have the same folder; give each name once"
    names+="$name "
done
data=${DATA:-} out=${OUT:-runs/evening}
[ -z "$data" ] || [ -d "$data" ] || refuse 3 "DATA=$data: no such folder"
python -c "import rlpjepa_zoo" 2> /dev/null || refuse 2 "python finds no rlpjepa_zoo; activate the environment in which it is installed"
{ mkdir -p "$out" && touch "$out/evening.log"; } 2> /dev/null || refuse 6 "OUT=$out: cannot be written"
exec > >(trap '' INT TERM; exec tee -a "$out/evening.log") 2>&1

# The shell acts on a signal only between commands, so commands run in the background and get the signal from here.
child="" stopped=0
trap 'stopped=130; kill -TERM $child 2> /dev/null' INT
trap 'stopped=143; kill -TERM $child 2> /dev/null' TERM

run() { # print a command, run it, and return its exit code
    { printf '+'; printf ' %q' "$@"; echo; } >&2
    "$@" & child=$!
    wait "$child"; code=$?
    while kill -0 "$child" 2> /dev/null; do wait "$child"; code=$?; done # a trapped signal ends the first wait early
    return "$code"
}

failures=() first=0
attempt() { # attempt WHAT COMMAND ...: run a command of the recipe $name, and remember a failure
    local what=$1; shift
    run "$@" && return
    [ "$first" != 0 ] || first=$code
    [ "$stopped" != 0 ] || failures+=("$name: $what ended with exit code $code")
    return 1
}

words() { # words RECIPE: set name and given, the arguments that check and train have in common
    name=$(basename "$1" .yaml) given=("$1")
    [ -z "$data" ] || [ ! -d "$data/${name%%-*}" ] || given+=("data.path=$data/${name%%-*}")
    given+=("${overrides[@]+"${overrides[@]}"}")
}

checked=()
for recipe in "${recipes[@]}"; do # mistakes show now, and not in the night
    words "$recipe"
    attempt check python -m rlpjepa_zoo check "${given[@]}" > /dev/null && checked+=("$recipe")
    [ "$stopped" = 0 ] || break
done
for recipe in "${checked[@]+"${checked[@]}"}"; do
    [ "$stopped" = 0 ] || break
    words "$recipe"
    folder=$out/$name
    attempt train python -m rlpjepa_zoo train "${given[@]}" --out "$folder" --resume --quiet || continue
    [ -e "$folder/eval.json" ] && [ ! "$folder/checkpoints" -nt "$folder/eval.json" ] && continue # this training was evaluated before
    attempt eval python -m rlpjepa_zoo eval "$folder" --data "$folder/recipe.yaml" --probes knn,linear --no-pixels --limit 130000 --out "$folder/eval.json" --quiet
done

if [ "$stopped" != 0 ]; then
    say "stopped; the same command goes on from the last checkpoint"
    exit "$stopped"
fi
for failure in "${failures[@]+"${failures[@]}"}"; do say "$failure"; done
say "$((${#recipes[@]} - ${#failures[@]})) of ${#recipes[@]} recipes are done, see $out"
exit "$first"
