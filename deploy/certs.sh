#!/bin/sh
# A development CA, the SuperLink's certificate, SuperNode keys, and the secret that the SuperLink shares with the
# executor of ServerApps: deploy/certs.sh [-d FOLDER] [-n SITES] [NAME ...]
#
# FOLDER is deploy/certs, SITES 3 unless given; each NAME is a host name or an address by which clients call the
# SuperLink, beside localhost, 127.0.0.1, ::1 and superlink. What exists is kept, a key is never written over: to renew
# a certificate, or give it other names, remove server.crt and run this again with all its names. ca.key may be kept
# elsewhere, and ca.crt, server.crt and server.key be another authority's: then the NAMEs given are looked for in it.
set -eu
umask 077

fail() {
  echo "certs.sh: $1" >&2
  exit 1
}

usage='usage: deploy/certs.sh [-d FOLDER] [-n SITES] [NAME ...]'
folder=$(dirname -- "$0")/certs
sites=3
while getopts d:n: option; do
  case $option in
    d) folder=$OPTARG ;;
    n) sites=$OPTARG ;;
    *) fail "$usage" ;;
  esac
done
shift $((OPTIND - 1))
case $sites in '' | *[!0-9]*) fail "-n $sites: a number of sites is wanted; $usage" ;; esac
for tool in openssl ssh-keygen; do
  command -v "$tool" >/dev/null || fail "$tool is missing: install openssl and openssh-client (as Debian names them)"
done

mkdir -p "$folder/keys"
new=$(mktemp -d "$folder/.new-XXXXXX") # what is made here is moved to its place when it is whole
trap 'rm -rf "$new"' EXIT
[ -e "$folder/.gitignore" ] || echo '*' >"$folder/.gitignore"

is_address() {
  case $1 in *:*) true ;; *[!0-9.]*) false ;; *) true ;; esac
}

tls_key() { # NAME
  [ -e "$folder/$1" ] && return
  openssl ecparam -name secp384r1 -genkey -noout -out "$new/$1"
  publish 600 "$1"
}

secret() {
  [ -e "$folder/superexec.secret" ] && return
  openssl rand -hex 32 >"$new/superexec.secret"
  publish 600 superexec.secret
}

publish() { # MODE NAME
  chmod "$1" "$new/$2"
  mv "$new/$2" "$folder/$2"
  echo "made $folder/$2"
}

authority() {
  [ -e "$folder/ca.crt" ] && return
  tls_key ca.key
  cat >"$new/ca.conf" <<-'END'
	[req]
	prompt = no
	distinguished_name = name
	x509_extensions = extensions
	[name]
	CN = Fedbasin development CA
	[extensions]
	basicConstraints = critical, CA:TRUE, pathlen:0
	keyUsage = critical, keyCertSign, cRLSign
	subjectKeyIdentifier = hash
	END
  openssl req -x509 -new -sha384 -days 3650 -config "$new/ca.conf" -key "$folder/ca.key" -out "$new/ca.crt"
  publish 644 ca.crt
}

alternatives() { # NAME ...
  for name in "$@"; do
    if is_address "$name"; then printf 'IP:%s,' "$name"; else printf 'DNS:%s,' "$name"; fi
  done
}

server() { # NAME ...
  [ -e "$folder/server.crt" ] && return
  [ -e "$folder/ca.key" ] || fail "$folder/ca.key is missing, which is to sign server.crt: put it back until it has"
  tls_key server.key
  names=$(alternatives localhost superlink 127.0.0.1 ::1 "$@")
  cat >"$new/server.conf" <<-END
	basicConstraints = critical, CA:FALSE
	keyUsage = critical, digitalSignature
	extendedKeyUsage = serverAuth
	subjectAltName = ${names%,}
	subjectKeyIdentifier = hash
	authorityKeyIdentifier = keyid
	END
  printf '[req]\nprompt = no\ndistinguished_name = name\n[name]\nCN = superlink\n' >"$new/request.conf"
  openssl req -new -sha384 -config "$new/request.conf" -key "$folder/server.key" -out "$new/server.csr"
  openssl x509 -req -sha384 -days 825 -in "$new/server.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$new/server.conf" -out "$new/server.crt" 2>"$new/said" ||
    fail "$(cat "$new/said")"
  publish 644 server.crt
}

refuse_unless_good() { # NAME ...
  renew="remove $folder/server.crt, then run this again"
  openssl verify -CAfile "$folder/ca.crt" -untrusted "$folder/server.crt" "$folder/server.crt" >/dev/null 2>&1 ||
    fail "$folder/server.crt is not of $folder/ca.crt, or has expired: $renew"
  openssl pkey -in "$folder/server.key" -pubout 2>/dev/null >"$new/of-key" || true
  openssl x509 -in "$folder/server.crt" -noout -pubkey | cmp -s - "$new/of-key" ||
    fail "$folder/server.key is not that of $folder/server.crt: put it back, or $renew"
  for name in "$@"; do
    check=-checkhost
    if is_address "$name"; then check=-checkip; fi
    openssl x509 -in "$folder/server.crt" -noout "$check" "$name" | grep -q 'does match' ||
      fail "$folder/server.crt is not for $name: $renew"
  done
}

site_key() { # NUMBER
  key=$folder/keys/site-$1
  if [ -e "$key" ] || [ -e "$key.pub" ]; then return; fi # a site that has its own host sends the public half only
  ssh-keygen -q -t ecdsa -b 384 -N '' -C "site-$1" -f "$new/site"
  chmod 644 "$new/site.pub"
  mv "$new/site.pub" "$key.pub"
  mv "$new/site" "$key"
  echo "made $key and $key.pub"
}

secret
authority
server "$@"
refuse_unless_good "$@"
number=0
while [ "$number" -lt "$sites" ]; do
  site_key "$number"
  number=$((number + 1))
done
