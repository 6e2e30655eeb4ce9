// Package dials has every way of dialling that grpc-go has.
package dials

import (
	"context"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Ways to the socket by what they are. What ends up in :authority differs with each; none of it may matter.
func Ways(socket string) map[string]func() (*grpc.ClientConn, error) {
	plain := grpc.WithTransportCredentials(insecure.NewCredentials())
	dialer := grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	})
	to := func(target string, options ...grpc.DialOption) func() (*grpc.ClientConn, error) {
		return func() (*grpc.ClientConn, error) { return grpc.NewClient(target, append(options, plain)...) }
	}
	authority := grpc.WithAuthority
	return map[string]func() (*grpc.ClientConn, error){
		"unix://":                    to("unix://" + socket),
		"unix:":                      to("unix:" + socket),
		"a dialer, a path":           to("passthrough:///"+socket, dialer),
		"a dialer, a URL":            to("passthrough:///unix://"+socket, dialer),
		"a dialer, passthrough:path": to("passthrough:"+socket, dialer),
		"a dialer, a name":           to("passthrough:///spire-agent", dialer),
		"a dialer, nothing":          to("passthrough:///", dialer),
		"a dialer, DNS":              to("localhost:1", dialer),
		"a dialer, dns:":             to("dns:///127.0.0.1:1", dialer),
		"Dial": func() (*grpc.ClientConn, error) {
			return grpc.Dial(socket, plain, dialer) //nolint:staticcheck // old clients do
		},
		"authority: a path":          to("unix://"+socket, authority("/run/spire/sockets/agent.sock")),
		"authority: a percent sign":  to("unix://"+socket, authority("run%2Fagent.sock")),
		"authority: as Envoy's":      to("unix://"+socket, authority("outbound|8080||x.default.svc")),
		"authority: spaces":          to("unix://"+socket, authority("a b c")),
		"authority: not ASCII":       to("unix://"+socket, authority("bücher.example")),
		"authority: an open bracket": to("unix://"+socket, authority("[::1")),
		"authority: an underscore":   to("unix://"+socket, authority("spire_agent")),
		"authority: one character":   to("unix://"+socket, authority("/")),
	}
}
