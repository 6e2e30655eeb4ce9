// Clients in Go: every way of dialling that grpc-go has, and go-spiffe.
//
//	go run . SOCKET
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

const (
	patience = 20 * time.Second
	expected = "spiffe://example.org/myservice"
)

var failed bool

func check(name string, err error) {
	if err != nil {
		fmt.Printf("FAILED: %s: %v\n", name, err)
		failed = true
	}
}

// What ends up in :authority differs with each of these; none of it may matter.
func dials(socket string) map[string]func() (*grpc.ClientConn, error) {
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

func fetch(conn *grpc.ClientConn) error {
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	// The second call refers to what the first has put into the header table.
	for range 2 {
		answer, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
		if err != nil {
			return err
		}
		if got := answer.Svids[0].SpiffeId; got != expected {
			return fmt.Errorf("got %s", got)
		}
	}
	return nil
}

func present() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return err
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		return err
	}
	if svid.ID.String() != expected {
		return fmt.Errorf("got %s", svid.ID)
	}
	token, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "them"})
	if err != nil {
		return err
	}
	_, err = workloadapi.ValidateJWTSVID(ctx, token.Marshal(), "them")
	return err
}

func main() {
	socket := os.Args[1]
	ways := dials(socket)
	for name, dial := range ways {
		conn, err := dial()
		if err == nil {
			err = fetch(conn)
		}
		check(name, err)
	}
	check("go-spiffe", present())
	if failed {
		os.Exit(1)
	}
	fmt.Printf("go: %d ways of dialling, go-spiffe\n", len(ways))
}
