#!/bin/sh
# A certificate authority of one's own and a server certificate for the names that clients use.
#   make-certs.sh FOLDER NAME [NAME...]     e.g. make-certs.sh /etc/redis/tls queue queue.internal 10.0.0.5
set -eu
[ $# -ge 2 ] || { echo "usage: $0 FOLDER NAME [NAME...]" >&2; exit 1; }
folder=$1; shift
mkdir -p "$folder"; cd "$folder"; umask 077

names=
for name in "$@"; do
  case $name in
    *:*|*[0-9].[0-9]*.[0-9]*.[0-9]*) kind=IP ;;
    *) kind=DNS ;;
  esac
  names="${names:+$names,}$kind:$name"
done

[ -f ca.key ] || openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
  -keyout ca.key -out ca.crt -subj "/CN=headrace queue CA" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign"
openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout server.key -out server.csr -subj "/CN=$1"
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 825 -extfile server.ext -out server.crt
rm server.csr server.ext
chmod 644 ca.crt server.crt
