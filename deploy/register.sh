#!/bin/sh
# Registers the SuperNode key of every site with the SuperLink: register.sh FOLDER, which holds NAME.pub of each site.
# Keys that were registered before stay as they are, in or out; so it may run again, whenever a site is added.
set -eu

failed=0
for key in "$1"/*.pub; do
  name=$(basename "$key" .pub)
  said=$(flwr supernode register "$key" --name "$name" 2>&1) || case $said in
    *'already in use'*) said="$name was registered before" ;;
    *) failed=1 ;;
  esac
  echo "$said"
done
exit "$failed"
