#!/bin/sh
# Compiler launcher: runs the command and keeps what it prints on standard error (ptxas -v) beside the
# object file, as OBJECT.ptxas.log.
object=
previous=
for argument in "$@"; do
  [ "$previous" = "-o" ] && object=$argument
  previous=$argument
done
"$@" 2> "$object.ptxas.log"
status=$?
[ $status -eq 0 ] || cat "$object.ptxas.log" >&2
exit $status
