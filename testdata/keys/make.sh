#!/usr/bin/env bash
# Makes the key fixtures with real keytool (JDK 17 or later) and openssl 3. The keys are thrown away by making
# them public here: they open nothing. Run it in this folder; it replaces everything but itself.
set -euo pipefail
cd "$(dirname "$0")"
rm -f ./*.p12 ./*.pem ./*.json ./keytool.golden
pass=notasecret
gen() { # FILE ALIAS [JVM option]
  keytool ${3:+-J$3} -genkeypair -alias "$2" -keyalg RSA -keysize 2048 -dname "CN=$2" -validity 36500 \
    -storetype PKCS12 -keystore "$1" -storepass $pass 2>/dev/null
}
pair() { # NAME DAYS
  openssl req -x509 -newkey rsa:2048 -nodes -days "$2" -subj "/CN=$1" -keyout "$1-key.pem" -out "$1-cert.pem" 2>/dev/null
}
export12() { # OUT KEY CERT [OPTIONS]
  local out=$1 key=$2 cert=$3; shift 3
  openssl pkcs12 -export -out "$out" -inkey "$key-key.pem" -in "$cert-cert.pem" -passout pass:$pass "$@"
}

pair bridge 36500
pair other 36500
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=expired -keyout expired-key.pem -out /dev/null -days 1 2>/dev/null
openssl req -new -key expired-key.pem -subj /CN=expired -out expired.csr
openssl x509 -req -in expired.csr -signkey expired-key.pem -days -1 -out expired-cert.pem 2>/dev/null && rm expired.csr
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 36500 -subj /CN=ec -keyout ec-key.pem -out ec-cert.pem 2>/dev/null
openssl rsa -in bridge-key.pem -traditional -out bridge-pkcs1-key.pem 2>/dev/null
openssl rsa -in bridge-key.pem -aes128 -passout pass:$pass -out bridge-encrypted-key.pem 2>/dev/null
cat bridge-cert.pem bridge-key.pem > bridge-both.pem

gen google.p12 privatekey                                     # as Google's: one key, alias privatekey
gen google-legacy.p12 privatekey -Dkeystore.pkcs12.legacy=true
gen multi.p12 first; gen multi.p12 Second; gen multi.p12 third
export12 modern.p12 bridge bridge -name bridge
export12 legacy-rc2.p12 bridge bridge -name bridge -legacy
export12 legacy-3des.p12 bridge bridge -name bridge -legacy -certpbe PBE-SHA1-3DES -keypbe PBE-SHA1-3DES -macalg sha1
export12 unnamed.p12 bridge bridge
export12 ec.p12 ec ec -name ec
export12 nomac.p12 bridge bridge -name bridge -nomac
export12 chain.p12 bridge bridge -name bridge -certfile other-cert.pem
openssl pkcs12 -export -nocerts -out nocert.p12 -inkey bridge-key.pem -passout pass:$pass -name bridge
openssl pkcs12 -export -nokeys -out nokey.p12 -in bridge-cert.pem -passout pass:$pass -name bridge
cp google.p12 trusted.p12                                     # a key and a Java trusted-certificate entry
keytool -importcert -noprompt -alias ca -file other-cert.pem -keystore trusted.p12 -storepass $pass 2>/dev/null
cp multi.p12 multi-trusted.p12
keytool -importcert -noprompt -alias ca -file other-cert.pem -keystore multi-trusted.p12 -storepass $pass 2>/dev/null

key=$(awk '{printf "%s\\n", $0}' other-key.pem)
cat > service-account.json <<JSON
{"type":"service_account","project_id":"demo","private_key_id":"0123456789abcdef0123456789abcdef01234567","private_key":"$key","client_email":"svc@demo.iam.gserviceaccount.com","client_id":"100000000000000000001","token_uri":"https://oauth2.googleapis.com/token"}
JSON

# What keytool shows: FILE ALIAS KIND, which the tests compare with.
for f in *.p12; do
  keytool -list -keystore "$f" -storepass $pass 2>/dev/null | sed -nE 's/^([^,]+), .*(PrivateKeyEntry|trustedCertEntry), *$/\1 \2/p' | while read -r alias kind; do echo "$f $alias $kind"; done
done > keytool.golden
chmod 600 ./*.p12 ./*-key.pem bridge-both.pem service-account.json
