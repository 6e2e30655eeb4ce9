// go-spiffe, and grpc-go however it is dialled, through what the script that runs them does.
//
//	go run ./course SOCKET
package main

import (
	"context"
	"crypto/x509"
	"os"
	"time"

	"durward.test/interop/dials"
	"durward.test/interop/steps"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// How long a client of grpc-go's own waits before it opens its stream again.
const pause = time.Second

// A watch goes on by itself: what it meets in between is its own business.
type watch struct{ *steps.Told }

func (w watch) OnX509ContextUpdate(update *workloadapi.X509Context) {
	serials := map[string]string{}
	for _, svid := range update.SVIDs {
		serials[steps.Last(svid.ID.String())] = svid.Certificates[0].SerialNumber.String()
	}
	w.Tell(serials)
}

func (watch) OnX509ContextWatchError(error) {}

func present(ctx context.Context, socket string) *steps.Client {
	client, err := workloadapi.New(ctx, workloadapi.WithAddr("unix://"+socket))
	if err != nil {
		panic(err)
	}
	told := &steps.Told{}
	go client.WatchX509Context(ctx, watch{told}) //nolint:errcheck // it ends with us
	return &steps.Client{Told: told, Call: func() ([]string, error) {
		ctx, cancel := context.WithTimeout(ctx, steps.Patience)
		defer cancel()
		tokens, err := client.FetchJWTSVIDs(ctx, jwtsvid.Params{Audience: "a"})
		var ids []string
		for _, token := range tokens {
			ids = append(ids, steps.Last(token.ID.String()))
		}
		return ids, err
	}}
}

// A stream, opened again whatever ends it.
func follow(ctx context.Context, client workload.SpiffeWorkloadAPIClient, told *steps.Told) {
	for ; ctx.Err() == nil; time.Sleep(pause) {
		stream, err := client.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		for err == nil {
			var update *workload.X509SVIDResponse
			if update, err = stream.Recv(); err != nil {
				break
			}
			serials := map[string]string{}
			for _, svid := range update.Svids {
				var chain []*x509.Certificate
				if chain, err = x509.ParseCertificates(svid.X509Svid); err == nil {
					serials[steps.Last(svid.SpiffeId)] = chain[0].SerialNumber.String()
				}
			}
			told.Tell(serials)
		}
	}
}

func dialled(ctx context.Context, dial func() (*grpc.ClientConn, error)) *steps.Client {
	conn, err := dial()
	if err != nil {
		panic(err)
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "workload.spiffe.io", "true")
	client, told := workload.NewSpiffeWorkloadAPIClient(conn), &steps.Told{}
	go follow(ctx, client, told)
	return &steps.Client{Told: told, Call: func() ([]string, error) {
		ctx, cancel := context.WithTimeout(ctx, steps.Patience)
		defer cancel()
		answer, err := client.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
		var ids []string
		for _, token := range answer.GetSvids() {
			ids = append(ids, steps.Last(token.SpiffeId))
		}
		return ids, err
	}}
}

func main() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	socket := os.Args[1]
	clients := map[string]*steps.Client{"go-spiffe": present(ctx, socket)}
	for name, dial := range dials.Ways(socket) {
		clients["grpc-go, "+name] = dialled(ctx, dial)
	}
	steps.Follow(clients)
}
