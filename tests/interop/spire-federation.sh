#!/usr/bin/env bash
# Two real SPIRE Servers 1.15.3 of two trust domains that are federated: a workload of one gets the bundle of the other, and each
# authority that the other prepares.
source "$(dirname "${BASH_SOURCE[0]}")/spire.bash"

other=$(free_port)
ours=$(free_port)
theirs=$(free_port)
# federated PORT TRUST_DOMAIN ITS_PORT
federated() {
    cat <<CONF
federation {
    bundle_endpoint {
      address = "127.0.0.1"
      port = $1
      refresh_hint = "10s"
      profile "https_spiffe" {}
    }
    federates_with "$2" {
      bundle_endpoint_url = "https://127.0.0.1:$3"
      bundle_endpoint_profile "https_spiffe" { endpoint_spiffe_id = "spiffe://$2/spire/server" }
    }
  }
CONF
}
server_conf server "$port" example.org "$(federated "$ours" other.org "$theirs")"
server_conf other "$other" other.org "$(federated "$theirs" example.org "$ours")"
start_server
start_server other
spire-server bundle show -socketPath "$dir/other/api.sock" -format spiffe >"$dir/other.json"
spire-server bundle set -format spiffe -id spiffe://other.org -path "$dir/other.json" >/dev/null
spire-server bundle show >"$dir/bootstrap.pem"

agent_conf
run_agent "$joins" -joinToken "$(spire-server token generate -spiffeID spiffe://example.org/node | sed -n 's/^Token: //p')"
entry -spiffeID spiffe://example.org/web -federatesWith spiffe://other.org >/dev/null
mkdir "$dir/fetched"
roots_of_other_are() {
    durward api fetch x509 -silent -write "$dir/fetched" >/dev/null 2>&1 &&
        [ "$(grep -c BEGIN "$dir/fetched/federated_bundle.0.0.pem")" = "$1" ]
}
until_true 20 roots_of_other_are 1
spire-server localauthority x509 prepare -socketPath "$dir/other/api.sock" >/dev/null
until_true 60 roots_of_other_are 2
stop_agent
echo "spire-federation: followed the bundle of another SPIRE Server $version"
